"""The four files of prepared data, which appear whole or not at all.

- `train.bin`, `val.bin`: all tokens in one row (little-endian uint16, or uint32 for a large
  vocabulary), with end-of-text before the first document and after every one.
- `tokenizer.json`: what `load_tokenizer` restores.
- `metadata.json`: what the data are and what they were made from. It is put in place last: where
  it stands, the other three are whole and belong to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm.data.split import TRAIN, VAL

FORMAT = 1  # raise it when the same inputs give other files
METADATA, TOKENIZER = "metadata.json", "tokenizer.json"
FILES = (f"{TRAIN}.bin", f"{VAL}.bin", TOKENIZER, METADATA)  # in the order they are put in place


@dataclass
class PartSummary:
    """What one of the two token files holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    sha256: str = ""


class TokenWriter:
    """Appends documents to a file of token ids, and counts and hashes what it writes.

    Args:
        path: the file to make.
        dtype: NumPy's name for the type of an id.
        eot_id: written before the first document and after every one.
    """

    def __init__(self, path: Path, dtype: str, eot_id: int) -> None:
        self.dtype, self.eot_id = dtype, eot_id
        self.summary = PartSummary()
        self._digest = hashlib.sha256()
        self._file = path.open("wb")
        self._append([eot_id])

    def write(self, ids: list[int], size: int, ends_document: bool) -> None:
        """Append a piece of a document: its ids, its size in bytes, and whether it is the last."""
        self._append([*ids, self.eot_id] if ends_document else ids)
        self.summary.bytes += size
        self.summary.documents += ends_document

    def close(self) -> PartSummary:
        """Finish the file, on the disk and not only in its cache, and return what it holds."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.summary.sha256 = self._digest.hexdigest()
        return self.summary

    def _append(self, ids: list[int]) -> None:
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.summary.tokens += len(ids)


def read_metadata(data_dir: Path) -> dict[str, Any] | None:
    """Return the content of `metadata.json`, or None where the data are missing or not whole."""
    try:
        metadata = json.loads((data_dir / METADATA).read_text(encoding="utf-8"))
        whole = metadata["format"] == FORMAT and (data_dir / TOKENIZER).is_file()
        for part in (TRAIN, VAL):
            size = metadata[part]["tokens"] * np.dtype(metadata["dtype"]).itemsize
            whole = whole and (data_dir / f"{part}.bin").stat().st_size == size
        return metadata if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def put_in_place(partial: Path, data_dir: Path) -> None:
    """Move the finished files into `data_dir`, `metadata.json` first out and last in."""
    (data_dir / METADATA).unlink(missing_ok=True)
    for name in FILES:
        os.replace(partial / name, data_dir / name)
