"""Text and tokens as characters that can be seen: nothing in them is obeyed, nothing is lost.

A token may hold half a character, an escape sequence, or a mark that turns the direction of what
follows. Shown raw, it would be invisible, or change the page around it.
"""

from __future__ import annotations

import codecs
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer

PICTURES = {"\n": "↵\n", "\t": "⇥\t", "\x7f": "␡"}
FIRST_PICTURE = 0x2400  # Unicode's pictures of the 32 control characters of ASCII
# Controls, marks of format and direction, half and unassigned characters, and separators.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
CARRIER = "◌"  # what a mark stands on that would join the character before it


def _name_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"⟨{byte:02X}⟩" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("horovod_lm.name_bytes", _name_bytes)


def visible(text: str) -> str:
    """Return text whose every character can be seen; a line's end also still ends the line.

    A control character becomes its picture (`␛`), any other unseen one its number (`⟨U+202E⟩`).
    """
    shown = "".join(map(_visible_character, text))
    return CARRIER + shown if text and unicodedata.category(text[0])[0] == "M" else shown


def visible_bytes(data: bytes) -> str:
    """Return bytes as `visible` text; those that are no whole character become `⟨E2⟩`."""
    return visible(data.decode("utf-8", errors="horovod_lm.name_bytes"))


def visible_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return one token as it can be seen, by itself."""
    return visible_bytes(tokenizer.token_bytes(token_id))


@lru_cache(maxsize=4096)
def _visible_character(character: str) -> str:
    if character in PICTURES:
        return PICTURES[character]
    if character < " ":
        return chr(FIRST_PICTURE + ord(character))
    if character != " " and unicodedata.category(character) in UNSEEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character
