"""The split into training and validation text.

The part of a document is determined by a number drawn from the seed and the document's text: every
rank and every run computes the same split, adding or removing a document does not move another,
and two copies of a text are always in the same part. No validation text is in training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from horovod_lm.data.sources import Document

TRAIN, VAL = "train", "val"


class SplitText(NamedTuple):
    """A piece of text, its part, and whether it starts a document."""

    part: str
    text: str
    starts_document: bool

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode("utf-8"))


# Yields the text of documents, in order, with its part.
Split = Callable[[Iterable[Document]], Iterator[SplitText]]


class CorpusStats(NamedTuple):
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


def document_number(text: str, seed: int) -> float:
    """Return a number in [0, 1), uniform over texts, determined by text and seed."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def choose_split(stats: CorpusStats, seed: int, val_fraction: float) -> tuple[str, Split]:
    """Return the split of a corpus and its description for `metadata.json`.

    Documents are split whole; a single one (or copies of one) is cut. The threshold is
    `val_fraction`, adjusted where necessary so that each part gets at least one document.
    """
    if stats.smallest < stats.largest:
        threshold = min(max(val_fraction, math.nextafter(stats.smallest, 1.0)), stats.largest)
        return "by document", partial(split_by_number, seed=seed, threshold=threshold)
    train_bytes = round(stats.bytes / max(stats.documents, 1) * (1 - val_fraction))
    description = "the end of the one document is for validation"
    return description, partial(split_at, train_bytes=train_bytes)


def split_by_number(
    documents: Iterable[Document], seed: int, threshold: float
) -> Iterator[SplitText]:
    """Yield whole documents: those with a number below `threshold` are for validation."""
    for document in documents:
        part = ""
        for text in document.pieces():
            starts = not part
            if starts:
                part = VAL if document_number(text, seed) < threshold else TRAIN
            yield SplitText(part, text, starts)


def split_at(documents: Iterable[Document], train_bytes: int) -> Iterator[SplitText]:
    """Yield documents whose text after about `train_bytes` bytes is for validation."""
    for document in documents:
        room, part, starts = train_bytes, TRAIN, True
        for text in document.pieces():
            data = text.encode("utf-8")
            if part == TRAIN and len(data) > room:
                cut = len(data[:room].decode("utf-8", errors="ignore"))
                # At the end of a line, if one ends nearby.
                cut = text.rfind("\n", max(0, cut - max(80, cut // 20)), cut) + 1 or cut
                if cut:
                    yield SplitText(TRAIN, text[:cut], starts)
                part, text, starts = VAL, text[cut:], True
            yield SplitText(part, text, starts)
            room, starts = room - len(data), False
