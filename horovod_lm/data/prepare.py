"""From text to token files: once per host, atomically, in constant memory.

The corpus is read up to three times: to choose the split, to train the BPE on the training text,
and to encode everything. The result is four files in `data.data_dir`:

- `train.bin`, `val.bin`: all tokens in one row (little-endian uint16, or uint32 for a large
  vocabulary), with end-of-text before the first document and after every one.
- `tokenizer.json`: for `load_tokenizer`.
- `metadata.json`: a description of the data and of their inputs. It is published last: if it
  exists, the other three are complete and belong to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from horovod_lm.data.sources import Corpus, open_corpus
from horovod_lm.data.split import TRAIN, VAL, CorpusStats, SplitText, choose_split, split_by_number
from horovod_lm.data.synthetic.stories import story_entropy
from horovod_lm.data.tokenizers import Tokenizer, make_tokenizer, train_bpe
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DataError
from horovod_lm.utils.machine import sync_folder

FORMAT = 3  # to be incremented when the same inputs give other files
METADATA, TOKENIZER = "metadata.json", "tokenizer.json"
FILES = (f"{TRAIN}.bin", f"{VAL}.bin", TOKENIZER, METADATA)  # in the order of publication
DTYPES = ("<u2", "<u4")  # of a token id: two bytes, or four for a large vocabulary
BPE_TRAINING_BYTES = 64 << 20  # more text hardly changes a vocabulary
BATCH_CHARACTERS = 1 << 20  # text that is encoded in one call

Progress = Callable[[str, float], None]
"""Called with the current phase and its completed fraction, from 0 to 1."""


def prepare_data(config: Config, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Make the token files of `config` in `config.data.data_dir`, unless they exist.

    Any number of processes may call this at once: one prepares, the others wait and then find the
    data. If a preparation is killed, the earlier data remain. `progress` is called with each phase
    and its completed fraction. Returns the content of `metadata.json`.

    Raises:
        DataError: the text cannot be read, is too small, or does not fit the model's vocabulary.
    """
    data_dir = config.resolve(config.data.data_dir)
    corpus = open_corpus(config)
    inputs = {"format": FORMAT, "settings": data_settings(config), "corpus": corpus.fingerprint}
    digest = _sha256(json.dumps(inputs, sort_keys=True).encode())

    def unchanged() -> dict[str, Any] | None:
        metadata = read_metadata(data_dir)
        return metadata if metadata and metadata["inputs"] == digest else None

    if metadata := unchanged():
        return metadata  # without the lock: the folder may be read-only
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".lock"):
            # Another process may have prepared them while this one waited.
            return unchanged() or _prepare(config, corpus, digest, data_dir, progress)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"the data cannot be written to {data_dir}: {reason}") from None


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


def read_metadata(data_dir: Path) -> dict[str, Any] | None:
    """Return the content of `metadata.json`, or None if the data are missing or incomplete.

    Raises:
        DataError: a file may not be read.
    """
    try:
        metadata = json.loads((data_dir / METADATA).read_text(encoding="utf-8"))
        vocab_size, eot_id = (metadata["tokenizer"][key] for key in ("vocab_size", "eot_id"))
        complete = (
            metadata["format"] == FORMAT
            and metadata["dtype"] in DTYPES
            and 0 <= eot_id < vocab_size
            and metadata["block_length"] == metadata["settings"]["model.max_seq_len"]
            and isinstance(metadata["inputs"], str)
            and metadata["tokenizer"]["sha256"] == _sha256((data_dir / TOKENIZER).read_bytes())
        )
        for part in (TRAIN, VAL):
            size = metadata[part]["tokens"] * np.dtype(metadata["dtype"]).itemsize
            complete = complete and 0 < size == (data_dir / f"{part}.bin").stat().st_size
        return metadata if complete else None
    except PermissionError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(partial: Path, data_dir: Path) -> None:
    """Move the finished files into `data_dir`; remove `metadata.json` first and add it last."""
    (data_dir / METADATA).unlink(missing_ok=True)
    for name in FILES:
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial / name, data_dir / name)
    sync_folder(data_dir)


class TokenWriter:
    """A file of token ids of NumPy's type `dtype` that counts and hashes what it gets."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = dtype
        self.documents = self.tokens = self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb")

    def append(self, ids: list[int]) -> None:
        """Write ids at the end of the file."""
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)

    def close(self) -> dict[str, Any]:
        """Close the file and return its summary."""
        self._file.close()
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return {**counts, "sha256": self._digest.hexdigest()}


def _prepare(
    config: Config, corpus: Corpus, inputs: str, data_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Make the four files in a temporary folder, then move them into `data_dir`."""
    progress("reading", 0.0)
    stats = CorpusStats.of(corpus.documents(), config.seed)
    validation = CorpusStats.of(corpus.validation(), config.seed)
    total_bytes = stats.bytes + validation.bytes
    if not stats.documents:
        raise DataError(
            f"{corpus.description} contains no text: choose another data.path or source"
        )
    # If there is a validation split, its own documents are the only ones for validation.
    description, split = choose_split(stats, config.seed, config.data.val_fraction)

    def texts() -> Iterator[SplitText]:
        if not validation.documents:
            yield from split(corpus.documents())
            return
        yield from split_by_number(corpus.documents(), seed=config.seed, threshold=0.0)
        yield from split_by_number(corpus.validation(), seed=config.seed, threshold=1.0)

    tokenizer = _make_tokenizer(config, texts(), total_bytes, progress)
    partial = data_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # from a killed preparation
    partial.mkdir()
    try:
        dtype = DTYPES[tokenizer.vocab_size > 1 << 16]
        parts = _encode(texts(), tokenizer, partial, dtype, total_bytes, progress)
        _check_size(config, corpus, parts)
        tokenizer_json = tokenizer.to_json().encode()
        metadata = {
            "format": FORMAT,
            "inputs": inputs,
            "settings": data_settings(config),
            "corpus": corpus.description,
            "split": "the dataset's own validation split" if validation.documents else description,
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "eot_id": tokenizer.eot_id,
                "sha256": _sha256(tokenizer_json),
            },
            "dtype": dtype,
            "block_length": config.model.max_seq_len,
            **_statistics(config, parts),
        }
        (partial / TOKENIZER).write_bytes(tokenizer_json)
        (partial / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        publish(partial, data_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def _make_tokenizer(
    config: Config, texts: Iterable[SplitText], total_bytes: int, progress: Progress
) -> Tokenizer:
    """Return the tokenizer of `config`; a BPE is trained on training text only."""

    def training_texts() -> Iterator[str]:
        seen, wanted = 0, min(total_bytes, BPE_TRAINING_BYTES)
        for text in texts:
            seen += text.size
            progress("training the tokenizer", min(1.0, seen / wanted))
            if text.part == TRAIN:
                yield text.text
            if seen >= wanted:
                return

    if config.data.tokenizer == "bpe":
        return train_bpe(training_texts(), config.model.vocab_size)
    tokenizer = make_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but "
            f"model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _encode(
    texts: Iterable[SplitText],
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str,
    total_bytes: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Write the token files of both parts and return a summary of each."""
    writers = {part: TokenWriter(folder / f"{part}.bin", dtype) for part in (TRAIN, VAL)}
    done = 0
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch([text.text for text in batch])
        for text, ids in zip(batch, encoded, strict=True):
            writer = writers[text.part]
            writer.append([tokenizer.eot_id, *ids] if text.starts_document else ids)
            writer.documents += text.starts_document
            writer.bytes += text.size
            done += text.size
        progress("encoding", done / total_bytes)
    for writer in writers.values():
        writer.append([tokenizer.eot_id])
    return {part: writer.close() for part, writer in writers.items()}


def _batches(texts: Iterable[SplitText]) -> Iterator[list[SplitText]]:
    """Group texts to about `BATCH_CHARACTERS` characters."""
    batch: list[SplitText] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_size(config: Config, corpus: Corpus, parts: dict[str, dict[str, Any]]) -> None:
    block_length, tokens = config.model.max_seq_len, parts[TRAIN]["tokens"]
    if tokens < block_length:
        raise DataError(
            f"{corpus.description} gives {tokens} training tokens, fewer than one "
            f"block of {block_length}: use more text or a smaller model.max_seq_len"
        )
    if not parts[VAL]["documents"]:
        raise DataError(
            f"{corpus.description} leaves no text for validation: "
            "use more text or a larger data.val_fraction"
        )


def _statistics(config: Config, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the part of `metadata.json` that describes the amount of text."""
    documents, tokens, size = (
        sum(part[unit] for part in parts.values()) for unit in ("documents", "tokens", "bytes")
    )
    statistics = {"bytes_per_token": round(size / tokens, 4), **parts}
    if config.data.source == "stories":
        statistics["stories"] = {
            "entropy_nats_per_story": story_entropy(),
            "tokens_per_story": round((tokens - 2) / documents, 4),
        }
    return statistics
