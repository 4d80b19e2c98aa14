"""Tokenizers: byte-level BPE, plain bytes, and GPT-2's vocabulary.

Every tokenizer encodes any text and decodes it back exactly. One more id, end-of-text, separates
documents; no text encodes to it, not even the characters `<|endoftext|>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from horovod_lm.utils.errors import DataError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
NUM_BYTES = 256
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
CONNECT_SECONDS = 5


class Tokenizer(ABC):
    """Base class of the tokenizers."""

    name: str  # `bpe`, `byte` or `gpt2`
    vocab_size: int  # number of ids, end-of-text included
    eot_id: int  # the id of end-of-text

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; end-of-text is never among them."""

    @abstractmethod
    def _bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a valid id that is not end-of-text."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text; `encode_batch` is faster for many."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: incomplete characters and invalid ids as U+FFFD."""
        return b"".join(self.token_bytes(int(one)) for one in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token: `<|endoftext|>` for end-of-text, U+FFFD if invalid."""
        if token_id == self.eot_id:
            return END_OF_TEXT.encode()
        return self._bytes_of(token_id) if 0 <= token_id < self.vocab_size else UNKNOWN.encode()

    def to_json(self) -> str:
        """Return the tokenizer as JSON text for `load_tokenizer`."""
        return json.dumps({"name": self.name})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: ids 0 to 255, and 256 for end-of-text. No training."""

    name = "byte"
    vocab_size = NUM_BYTES + 1
    eot_id = NUM_BYTES

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _bytes_of(self, token_id: int) -> bytes:
        return bytes([token_id])


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al., 2019).

    End-of-text is the last id. The `tokenizers` object inside does not contain it, so no text can
    encode to it.
    """

    name = "bpe"

    def __init__(self, library_tokenizer: Any) -> None:
        self._tokenizer = library_tokenizer
        self.eot_id = library_tokenizer.get_vocab_size()
        self.vocab_size = self.eot_id + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _bytes_of(self, token_id: int) -> bytes:
        byte_of = _byte_of_letter()
        return bytes(byte_of[letter] for letter in self._tokenizer.id_to_token(token_id))

    def to_json(self) -> str:
        content = {"name": self.name, "tokenizer": json.loads(self._tokenizer.to_str())}
        return json.dumps(content, ensure_ascii=False)


@cache
def _byte_of_letter() -> dict[str, int]:
    """Return the byte of each letter of a byte-level vocabulary.

    As in GPT-2, a printable byte is its own character, and the others are the characters from 256.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(NUM_BYTES + place): byte for place, byte in enumerate(others)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE tokenizer on pieces of text: merge the most frequent pair, repeatedly.

    `vocab_size` includes end-of-text; a small corpus may have pairs for fewer tokens.

    Raises:
        DataError: `vocab_size` is below 257: one per byte and one for end-of-text.
    """
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size <= NUM_BYTES:
        raise DataError(
            f"a byte-level BPE needs at least {NUM_BYTES + 1} tokens (all bytes and end-of-text), "
            f"but model.vocab_size is {vocab_size}"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer)


def _byte_level(model: Any) -> Any:
    """Return a tokenizer of the library that adds nothing to the text and removes nothing."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _read_bpe(model: dict[str, Any]) -> BPETokenizer:
    """Return the tokenizer of a vocabulary and merges; raise an error if it is not byte-level."""
    from tokenizers import models

    vocabulary, letters = model["vocab"], set(_byte_of_letter())
    if set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError("the ids of its vocabulary are not 0, 1, 2 ...")
    if not letters <= vocabulary.keys() or set("".join(vocabulary)) != letters:
        raise ValueError("its vocabulary is not one of bytes")
    merges = [(left, right) for left, right in model["merges"]]
    if any(not {left, right, left + right} <= vocabulary.keys() for left, right in merges):
        raise ValueError("a merge is not in its vocabulary")  # the library would panic
    return BPETokenizer(_byte_level(models.BPE(vocab=vocabulary, merges=merges)))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's vocabulary of 50,257 tokens, by tiktoken.

    Raises:
        DataError: its file is not on disk and cannot be downloaded.
    """

    name = "gpt2"
    vocab_size = 50257
    eot_id = 50256

    def __init__(self) -> None:
        import tiktoken

        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
        try:
            if not Path(folder, hashlib.sha1(GPT2_MERGES.encode()).hexdigest()).exists():
                check_reachable(GPT2_MERGES)  # tiktoken itself has no timeout
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise DataError(
                f"GPT-2's vocabulary is not on this disk and cannot be downloaded "
                f"({type(error).__name__}): connect to the network, or set TIKTOKEN_CACHE_DIR to "
                "the folder that contains it, or use data.tokenizer=bpe"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _bytes_of(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id)


def check_reachable(url: str) -> None:
    """Raise ConnectionError within seconds if a server does not answer; libraries wait minutes."""
    import requests

    try:
        requests.head(url, timeout=CONNECT_SECONDS, allow_redirects=True).raise_for_status()
    except requests.RequestException:
        raise ConnectionError(f"{url} cannot be reached") from None


def check_text(text: str, name: str) -> None:
    """Raise DataError if `text`, called `name` in the message, has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} contains an unpaired surrogate, {text[error.start]!r} at position "
            f"{error.start}, which has no UTF-8 form: remove it"
        ) from None


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Restore a tokenizer from the result of `to_json()`, or from the path of a file with it.

    Raises:
        DataError: `source` is not a tokenizer's JSON, or the file does not exist.
    """
    text = str(source)
    if not text.lstrip().startswith("{"):
        try:
            text = Path(source).read_text(encoding="utf-8-sig")  # Windows adds a byte-order mark
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise DataError(f"the tokenizer {source} cannot be read: {reason}") from None
    try:
        content = json.loads(text)
        name = content["name"]
        if name == "bpe":
            return _read_bpe(content["tokenizer"]["model"])
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"this is not a tokenizer of horovod_lm ({reason})") from None
    return make_tokenizer(name)


def make_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that needs no training: `byte` or `gpt2`."""
    kinds = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}
    if not isinstance(name, str) or name not in kinds:
        raise DataError(f"unknown tokenizer {name!r}: use bpe, byte or gpt2")
    return kinds[name]()
