"""Text to token ids and back: byte-level BPE, plain bytes, and GPT-2's own vocabulary.

Every tokenizer maps any text to ids and back exactly. One id more, end-of-text, stands between
documents; no text encodes to it, not even one that holds the characters `<|endoftext|>`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from horovod_lm.data.network import check_reachable
from horovod_lm.utils.errors import DataError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
NUM_BYTES = 256
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


class Tokenizer(Protocol):
    """What every tokenizer offers.

    Attributes:
        name: `bpe`, `byte` or `gpt2`.
        vocab_size: number of ids, end-of-text included.
        eot_id: the id of end-of-text.
    """

    name: str
    vocab_size: int
    eot_id: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; end-of-text is never among them."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; faster than one by one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: end-of-text as `<|endoftext|>`, ids of no token as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; they may be part of a character only."""
        ...

    def to_json(self) -> str:
        """Return all that `load_tokenizer` needs to restore the tokenizer."""
        ...


class _Base:
    """What the tokenizers share: decoding around end-of-text and around ids that no token has."""

    name: str
    vocab_size: int
    eot_id: int

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def _decode_plain(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _bytes_of_plain(self, token_id: int) -> bytes:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        if 0 <= token_id < self.vocab_size and token_id != self.eot_id:
            return self._bytes_of_plain(token_id)
        return self.decode([token_id]).encode()

    def decode(self, ids: Iterable[int]) -> str:
        def kind(token: int) -> str | None:
            if token == self.eot_id:
                return END_OF_TEXT
            return None if 0 <= token < self.vocab_size else UNKNOWN

        runs = itertools.groupby(map(int, ids), key=kind)
        return "".join(
            self._decode_plain(list(run)) if mark is None else mark * len(list(run))
            for mark, run in runs
        )

    def to_json(self) -> str:
        return json.dumps({"name": self.name})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class ByteTokenizer(_Base):
    """One token per byte of UTF-8: ids 0 to 255, and 256 for end-of-text. Nothing to train."""

    name = "byte"
    vocab_size = NUM_BYTES + 1
    eot_id = NUM_BYTES

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _decode_plain(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def _bytes_of_plain(self, token_id: int) -> bytes:
        return bytes([token_id])


class BPETokenizer(_Base):
    """Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al., 2019), trained on a
    corpus.

    End-of-text is the last id. The library's tokenizer inside does not know it, so that no text can
    make it.
    """

    name = "bpe"

    def __init__(self, library_tokenizer: Any) -> None:
        self._tokenizer = library_tokenizer
        self.eot_id = library_tokenizer.get_vocab_size()
        self.vocab_size = self.eot_id + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _bytes_of_plain(self, token_id: int) -> bytes:
        return bytes(map(_byte_of_letter().get, self._tokenizer.id_to_token(token_id)))

    def to_json(self) -> str:
        return json.dumps(
            {"name": self.name, "tokenizer": json.loads(self._tokenizer.to_str())},
            ensure_ascii=False,
        )


@cache
def _byte_of_letter() -> dict[str, int]:
    """Return which byte each letter of a byte-level vocabulary stands for.

    GPT-2's way of writing any bytes as text: a byte that can be seen is its own character, and the
    others, in order, are the characters from 256 on.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(NUM_BYTES) if byte not in seen]
    letters = {chr(byte): byte for byte in seen}
    return letters | {chr(NUM_BYTES + place): byte for place, byte in enumerate(unseen)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE tokenizer: the most frequent pair becomes a token, again and again.

    Args:
        texts: the text to learn from, in pieces.
        vocab_size: ids to make, end-of-text included; a small corpus may have pairs for fewer.

    Raises:
        DataError: `vocab_size` is below 257, one for each byte and one for end-of-text.
    """
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size <= NUM_BYTES:
        raise DataError(
            f"a byte-level BPE needs at least {NUM_BYTES + 1} tokens (all bytes and end-of-text): "
            f"model.vocab_size is {vocab_size}"
        )
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer)


class GPT2Tokenizer(_Base):
    """GPT-2's vocabulary of 50,257 tokens, through tiktoken.

    Raises:
        DataError: its file is not on disk and cannot be downloaded.
    """

    name = "gpt2"
    vocab_size = 50257
    eot_id = 50256

    def __init__(self) -> None:
        self._encoding = _load_gpt2_encoding()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def _bytes_of_plain(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id)


def _load_gpt2_encoding() -> Any:
    """Return tiktoken's GPT-2 encoding; find out quickly when it cannot be had."""
    import tiktoken

    try:
        if not gpt2_is_on_disk():
            check_reachable(GPT2_MERGES)  # tiktoken itself would wait without a limit
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise DataError(
            f"GPT-2's vocabulary is not on this disk and cannot be downloaded "
            f"({type(error).__name__}): go online once, or point TIKTOKEN_CACHE_DIR to a folder "
            "that holds it, or use data.tokenizer=bpe"
        ) from None


def gpt2_is_on_disk() -> bool:
    """Return whether GPT-2's vocabulary is there without a network, where tiktoken keeps it."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return (Path(folder) / hashlib.sha1(GPT2_MERGES.encode()).hexdigest()).exists()


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Restore a tokenizer.

    Args:
        source: what `to_json()` returned, or the path of a file that holds it.

    Raises:
        DataError: `source` is not a tokenizer's JSON, or no such file exists.
    """
    text = str(source)
    if not text.lstrip().startswith("{"):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"the tokenizer {source} cannot be read: {error.strerror}") from None
    try:
        content = json.loads(text)
        name = content["name"]
        if name == "bpe":
            from tokenizers import Tokenizer as LibraryTokenizer

            return BPETokenizer(LibraryTokenizer.from_str(json.dumps(content["tokenizer"])))
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"this is not a tokenizer of ours ({reason})") from None
    return make_tokenizer(name)


def make_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that needs no training: `byte` or `gpt2`."""
    kinds = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}
    if name not in kinds:
        raise DataError(f"there is no tokenizer {name!r}: use bpe, byte or gpt2")
    return kinds[name]()
