"""Text and tokens in visible characters: nothing is hidden, and nothing changes the page around it.

A token may contain an incomplete UTF-8 sequence, an escape sequence, or a mark that changes the
direction of the text after it.
"""

from __future__ import annotations

import codecs
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer

SYMBOLS = {"\n": "↵\n", "\t": "⇥\t", "\x7f": "␡"}
CONTROL_PICTURES = 0x2400  # Unicode's symbols of the 32 control characters of ASCII
# Controls, marks of format and direction, surrogates, unassigned characters, and separators.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
DOTTED_CIRCLE = "◌"  # carries a combining mark that would join the character before it


def _name_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"⟨{byte:02X}⟩" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("horovod_lm.name_bytes", _name_bytes)


def visible(text: str) -> str:
    """Return text with every character visible; a line end still ends the line.

    A control character becomes its symbol (`␛`), any other invisible one its number (`⟨U+202E⟩`).
    """
    shown = "".join(map(_visible_character, text))
    return DOTTED_CIRCLE + shown if text and unicodedata.category(text[0])[0] == "M" else shown


def visible_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return one token as `visible` text; bytes of an incomplete character become `⟨E2⟩`."""
    data = tokenizer.token_bytes(token_id)
    return visible(data.decode("utf-8", errors="horovod_lm.name_bytes"))


@lru_cache(maxsize=4096)
def _visible_character(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    if character < " ":
        return chr(CONTROL_PICTURES + ord(character))
    if character != " " and unicodedata.category(character) in INVISIBLE:
        return f"⟨U+{ord(character):04X}⟩"
    return character
