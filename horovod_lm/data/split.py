"""The split into training and validation text.

The part of a document is determined by a number drawn from the seed and the document's text: every
rank and every run computes the same split, adding or removing a document does not move another,
and two copies of a text are always in the same part. No validation text is in training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from horovod_lm.data.sources import Document

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class SplitText:
    """A piece of text, its part, its size in UTF-8 bytes, and whether it ends its document."""

    part: str
    text: str
    size: int
    ends_document: bool


@dataclass(frozen=True)
class CorpusStats:
    """Number of documents, total bytes, and the range of the documents' numbers."""

    documents: int
    bytes: int
    smallest: float
    largest: float

    @classmethod
    def of(cls, documents: Iterable[Document], seed: int) -> CorpusStats:
        """Read the documents once; empty ones do not count."""
        count, size, smallest, largest = 0, 0, math.inf, -math.inf
        for document in documents:
            if first := next(iter(document.pieces()), ""):
                count, size = count + 1, size + document.size
                number = document_number(first, seed)
                smallest, largest = min(smallest, number), max(largest, number)
        return cls(count, size, smallest, largest)


class Split(Protocol):
    """A rule that assigns text to training and validation."""

    @property
    def description(self) -> str:
        """A short description, for `metadata.json`."""
        ...

    def assign(self, documents: Iterable[Document]) -> Iterator[SplitText]:
        """Yield the text of the documents, in order, with its part."""
        ...


def document_number(text: str, seed: int) -> float:
    """Return a number in [0, 1), uniform over texts, determined by text and seed."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def choose_split(stats: CorpusStats, seed: int, val_fraction: float) -> Split:
    """Return the split of a corpus: by document, or within the document if there is only one.

    The threshold is `val_fraction`, adjusted where necessary so that each part gets at least one
    document.
    """
    if stats.smallest < stats.largest:
        threshold = min(max(val_fraction, math.nextafter(stats.smallest, 1.0)), stats.largest)
        return DocumentSplit(seed, threshold)
    return TailSplit(round(stats.bytes / max(stats.documents, 1) * (1 - val_fraction)))


@dataclass(frozen=True)
class DocumentSplit:
    """Whole documents: those with a number below `threshold` are for validation."""

    seed: int
    threshold: float
    description: str = "by document"

    def assign(self, documents: Iterable[Document]) -> Iterator[SplitText]:
        for document in documents:
            part = ""
            for text, is_last in _with_last(document.pieces()):
                if not part:
                    part = VAL if document_number(text, self.seed) < self.threshold else TRAIN
                yield SplitText(part, text, len(text.encode("utf-8")), is_last)


@dataclass(frozen=True)
class TailSplit:
    """For a corpus of one document: the text after `train_bytes` bytes is for validation.

    The cut is at the end of a nearby line, or else of a word.
    """

    train_bytes: int
    description: str = "the end of the one document is for validation"

    def assign(self, documents: Iterable[Document]) -> Iterator[SplitText]:
        for document in documents:
            room, part = self.train_bytes, TRAIN
            for text, is_last in _with_last(document.pieces()):
                size = len(text.encode("utf-8"))
                if part == TRAIN and size > room:
                    cut = _cut_position(text, room)
                    if cut:
                        yield SplitText(TRAIN, text[:cut], len(text[:cut].encode("utf-8")), True)
                    part, text = VAL, text[cut:]
                    size = len(text.encode("utf-8"))
                room -= size
                yield SplitText(part, text, size, is_last)


def _cut_position(text: str, size: int) -> int:
    """Return the end of a line or a word of `text` near `size` bytes."""
    middle = len(text.encode("utf-8")[:size].decode("utf-8", errors="ignore"))
    near = max(80, len(text) // 20)
    for separator in ("\n\n", "\n", " "):
        position = text.rfind(separator, max(0, middle - near), middle)
        if position >= 0:
            return position + len(separator)
    return middle


def _with_last(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each piece and whether it is the last one."""
    previous: str | None = None
    for piece in pieces:
        if previous is not None:
            yield previous, False
        previous = piece
    if previous is not None:
        yield previous, True
