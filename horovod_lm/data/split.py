"""Which text is for training and which for validation.

A document's side follows from a number that is drawn from the seed and from its text, and from
nothing else: every rank and every run comes to the same split, a document that is added or removed
moves no other one, and two copies of a text always land on the same side. No token of validation is
in training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from horovod_lm.data.corpora import Document

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class SplitText:
    """A piece of text, its side, its size in UTF-8 bytes, and whether a document ends with it."""

    part: str
    text: str
    size: int
    ends_document: bool


@dataclass(frozen=True)
class Survey:
    """What one look at a corpus tells: its documents, its bytes, and the range of their numbers."""

    documents: int
    bytes: int
    smallest: float
    largest: float

    @classmethod
    def of(cls, documents: Iterable[Document], seed: int) -> Survey:
        """Count the documents that are not empty."""
        count, size, smallest, largest = 0, 0, math.inf, -math.inf
        for document in documents:
            if first := next(iter(document.pieces()), ""):
                count, size = count + 1, size + document.size
                number = document_number(first, seed)
                smallest, largest = min(smallest, number), max(largest, number)
        return cls(count, size, smallest, largest)


class Split(Protocol):
    """A rule that assigns text to training and validation."""

    description: str

    def assign(self, documents: Iterable[Document]) -> Iterator[SplitText]:
        """Yield the text of the documents, in order, with its side."""
        ...


def document_number(text: str, seed: int) -> float:
    """Return a number from [0, 1) that follows from the two and is evenly spread over texts."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def choose_split(survey: Survey, seed: int, val_fraction: float) -> Split:
    """Return the split for a corpus: by document, or within the document when there is only one.

    The bar below which a document's number puts it into validation is `val_fraction`, moved where
    it must be so that each side gets at least one document.
    """
    if survey.smallest < survey.largest:
        bar = min(max(val_fraction, math.nextafter(survey.smallest, 1.0)), survey.largest)
        return DocumentSplit(seed, bar)
    return TailSplit(round(survey.bytes / max(survey.documents, 1) * (1 - val_fraction)))


@dataclass(frozen=True)
class DocumentSplit:
    """Whole documents: those whose number lies below `bar` are for validation."""

    seed: int
    bar: float
    description: str = "by document"

    def assign(self, documents: Iterable[Document]) -> Iterator[SplitText]:
        for document in documents:
            part = ""
            for text, is_last in _with_last(document.pieces()):
                part = part or (VAL if document_number(text, self.seed) < self.bar else TRAIN)
                yield SplitText(part, text, len(text.encode("utf-8")), is_last)


@dataclass(frozen=True)
class TailSplit:
    """For a corpus of one document: what follows its first `train_bytes` bytes is for validation.

    The cut is made at the end of a line where there is one near, else at the end of a word.
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
    """Return where a line or a word of `text` ends after about `size` bytes."""
    middle = len(text.encode("utf-8")[:size].decode("utf-8", errors="ignore"))
    near = max(80, len(text) // 20)
    for separator in ("\n\n", "\n", " "):
        position = text.rfind(separator, max(0, middle - near), middle)
        if position >= 0:
            return position + len(separator)
    return middle


def _with_last(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each piece and whether it is the last one."""
    held: str | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = piece
    if held is not None:
        yield held, True
