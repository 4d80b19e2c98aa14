"""From text to token files: once per host, atomic, and in constant memory for a corpus of any size.

`data_dir` holds four files afterwards:

    train.bin, val.bin   all tokens in one row (little-endian uint16, or uint32 for large vocabularies),
                         end-of-text before the first document and after every one
    tokenizer.json       what `load_tokenizer` restores
    metadata.json        what the data are and what they were made from; written last: where it
                         stands, the other three are whole and belong to it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from horovod_lm.data.corpora import Corpus, open_corpus
from horovod_lm.data.split import TRAIN, VAL, Split, Survey, choose_split
from horovod_lm.data.stories import story_count, story_entropy
from horovod_lm.data.tokenizers import Tokenizer, make_tokenizer, train_bpe
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DataError

FORMAT = 1  # raise it when the same inputs give other files
METADATA, TOKENIZER = "metadata.json", "tokenizer.json"
FILES = (
    f"{TRAIN}.bin",
    f"{VAL}.bin",
    TOKENIZER,
    METADATA,
)  # metadata.json is the last to be put in place
BPE_TRAINING_BYTES = 64 << 20  # more text than this hardly changes a vocabulary
BATCH_CHARACTERS = 1 << 20  # text that is encoded in one go

Progress = Callable[[str, float], None]
"""Called with what is being done and the part of it that is done, from 0 to 1."""


def prepare_data(
    config: Config, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the token files of `config` in `config.data.data_dir`, unless they are there already.

    Any number of processes may call this at once: one prepares, the others wait for it and find the data
    made. A preparation that is killed leaves the earlier data as they were.

    Args:
        config: the settings; `data`, `seed`, `model.vocab_size` and `model.max_seq_len` matter here.
        force: prepare even when nothing has changed.
        progress: told how far the work is.

    Returns:
        The content of `metadata.json`.

    Raises:
        DataError: the text cannot be read, is too small, or does not fit the model's vocabulary.
    """
    data_dir = config.resolve(config.data.data_dir)
    corpus = open_corpus(config)
    inputs = _fingerprint(config, corpus)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".lock"):
            metadata = None if force else read_metadata(data_dir)
            if metadata is None or metadata["inputs"] != inputs:
                metadata = _prepare(
                    config, corpus, inputs, data_dir, progress or (lambda phase, done: None)
                )
            return metadata
    except OSError as error:
        raise DataError(
            f"the data cannot be written to {data_dir}: {error.strerror or error}"
        ) from None


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


def data_settings(config: Config) -> dict[str, Any]:
    """Return the settings that the prepared data depend on, by their dotted names."""
    data = config.data
    names = ["source", "tokenizer", "val_fraction", "max_bytes"]
    names += {"stories": ["num_stories"], "python": [], "files": ["path"]}.get(
        data.source, ["hub_dataset", "hub_config", "hub_text_field"]
    )
    settings = {f"data.{name}": getattr(data, name) for name in names}
    if data.tokenizer == "bpe":
        settings["model.vocab_size"] = config.model.vocab_size
    return {**settings, "model.max_seq_len": config.model.max_seq_len, "seed": config.seed}


def _fingerprint(config: Config, corpus: Corpus) -> str:
    inputs = {"format": FORMAT, "settings": data_settings(config), "corpus": corpus.fingerprint}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _prepare(
    config: Config, corpus: Corpus, inputs: str, data_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Make the four files in a folder of their own, then move them into `data_dir`."""
    survey = Survey.of(corpus.documents(), config.seed)
    if not survey.documents:
        raise DataError(
            f"{corpus.description} holds no text: choose another data.path or data.source"
        )
    split = choose_split(survey, config.seed, config.data.val_fraction)
    tokenizer = _make_tokenizer(config, corpus, survey, split, progress)
    partial = data_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed preparation left
    partial.mkdir()
    try:
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        writers = {
            part: TokenWriter(partial / f"{part}.bin", dtype, tokenizer.eot_id)
            for part in (TRAIN, VAL)
        }
        done = 0
        for batch in _batches(split.assign(corpus.documents())):
            for text, ids in zip(batch, tokenizer.encode_batch([text.text for text in batch])):
                writers[text.part].write(ids, text.size, text.ends_document)
            done += sum(text.size for text in batch)
            progress("encoding", done / max(survey.bytes, 1))
        parts = {part: writer.close() for part, writer in writers.items()}
        _check_size(config, corpus, parts)
        metadata = _describe(config, corpus, inputs, split, tokenizer, dtype, parts)
        (partial / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / METADATA).write_text(
            json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        _put_in_place(partial, data_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def _make_tokenizer(
    config: Config, corpus: Corpus, survey: Survey, split: Split, progress: Progress
) -> Tokenizer:
    """Return the tokenizer of `config`; a BPE learns from training text only."""
    if config.data.tokenizer == "bpe":
        wanted = min(survey.bytes, BPE_TRAINING_BYTES)
        tokenizer: Tokenizer = train_bpe(
            _training_texts(corpus, split, wanted, progress), config.model.vocab_size
        )
    else:
        tokenizer = make_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model room for "
            f"{config.model.vocab_size}: set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _training_texts(corpus: Corpus, split: Split, wanted: int, progress: Progress) -> Iterator[str]:
    seen = 0
    for text in split.assign(corpus.documents()):
        seen += text.size
        progress("learning the vocabulary", min(1.0, seen / max(wanted, 1)))
        if text.part == TRAIN:
            yield text.text
        if seen >= wanted:
            return


def _batches(texts: Iterable[Any]) -> Iterator[list[Any]]:
    """Group texts so that each group has about `BATCH_CHARACTERS` characters."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
        """Append a piece of a document: its ids, its size in bytes, and whether it is the document's last."""
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


def _check_size(config: Config, corpus: Corpus, parts: dict[str, PartSummary]) -> None:
    block_length = config.model.max_seq_len
    if parts[TRAIN].tokens < block_length:
        raise DataError(
            f"{corpus.description} gives {parts[TRAIN].tokens} training tokens, fewer than one block of "
            f"{block_length}: use more text or a smaller model.max_seq_len"
        )
    if parts[VAL].tokens < 2:
        raise DataError(
            f"{corpus.description} leaves no text for validation: use more text or a larger data.val_fraction"
        )


def _describe(
    config: Config,
    corpus: Corpus,
    inputs: str,
    split: Split,
    tokenizer: Tokenizer,
    dtype: str,
    parts: dict[str, PartSummary],
) -> dict[str, Any]:
    """Return the content of `metadata.json`."""
    summaries = parts.values()
    tokens, size = sum(part.tokens for part in summaries), sum(part.bytes for part in summaries)
    metadata = {
        "format": FORMAT,
        "inputs": inputs,
        "settings": data_settings(config),
        "corpus": corpus.description,
        "split": split.description,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
        },
        "dtype": dtype,
        "block_length": config.model.max_seq_len,
        "bytes_per_token": round(size / tokens, 4),
        TRAIN: asdict(parts[TRAIN]),
        VAL: asdict(parts[VAL]),
    }
    if config.data.source == "stories":
        documents = sum(part.documents for part in summaries)
        metadata["stories"] = {
            "entropy_nats_per_story": story_entropy(),
            "different_stories": story_count(),
            "tokens_per_story": round((tokens - 2) / documents, 4),
        }
    return metadata


def _put_in_place(partial: Path, data_dir: Path) -> None:
    """Move the finished files into `data_dir`; without metadata.json, what is there counts as no data."""
    (data_dir / METADATA).unlink(missing_ok=True)
    for name in FILES:
        os.replace(partial / name, data_dir / name)
