"""From text to token files: once per host, whole or not at all, in constant memory.

One preparation reads the corpus up to three times: to choose the split, to learn the vocabulary
from the training text, and to encode everything. See `horovod_lm.data.token_files` for the result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from horovod_lm.data.corpora import Corpus, open_corpus
from horovod_lm.data.split import TRAIN, VAL, Split, SplitText, Survey, choose_split
from horovod_lm.data.stories import story_count, story_entropy
from horovod_lm.data.token_files import (
    FORMAT,
    METADATA,
    TOKENIZER,
    PartSummary,
    TokenWriter,
    put_in_place,
    read_metadata,
)
from horovod_lm.data.tokenizers import Tokenizer, make_tokenizer, train_bpe
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DataError

BPE_TRAINING_BYTES = 64 << 20  # more text than this hardly changes a vocabulary
BATCH_CHARACTERS = 1 << 20  # text that is encoded in one go

Progress = Callable[[str, float], None]
"""Called with what is being done and the part of it that is done, from 0 to 1."""


def prepare_data(
    config: Config, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the token files of `config` in `config.data.data_dir`, unless they are there already.

    Any number of processes may call this at once: one prepares, the others wait for it and find the
    data made. A preparation that is killed leaves the earlier data as they were.

    Args:
        config: the settings; `data`, `seed`, `model.vocab_size` and `model.max_seq_len` matter
            here.
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
    if not force and (metadata := _unchanged(data_dir, inputs)):
        return metadata  # without the lock: the folder may be one that we cannot write to
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".lock"):
            # Another process may have made them while this one waited.
            if not force and (metadata := _unchanged(data_dir, inputs)):
                return metadata
            return _prepare(config, corpus, inputs, data_dir, progress or (lambda *_: None))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"the data cannot be written to {data_dir}: {reason}") from None


def _unchanged(data_dir: Path, inputs: str) -> dict[str, Any] | None:
    """Return the metadata of data that are whole and were made from the same inputs, else None."""
    metadata = read_metadata(data_dir)
    return metadata if metadata is not None and metadata["inputs"] == inputs else None


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
    progress("reading", 0.0)
    survey = Survey.of(corpus.documents(), config.seed)
    if not survey.documents:
        raise DataError(f"{corpus.description} holds no text: choose another data.path or source")
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
        _encode(split.assign(corpus.documents()), tokenizer, writers, survey.bytes, progress)
        parts = {part: writer.close() for part, writer in writers.items()}
        _check_size(config, corpus, parts)
        metadata = _describe(config, corpus, inputs, split, tokenizer, dtype, parts)
        (partial / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        content = json.dumps(metadata, indent=2, ensure_ascii=False)
        (partial / METADATA).write_text(content + "\n", encoding="utf-8")
        put_in_place(partial, data_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def _encode(
    texts: Iterable[SplitText],
    tokenizer: Tokenizer,
    writers: Mapping[str, TokenWriter],
    total_bytes: int,
    progress: Progress,
) -> None:
    """Encode the texts, some at a time, and append each to the file of its side."""
    done = 0
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch([text.text for text in batch])
        for text, ids in zip(batch, encoded, strict=True):
            writers[text.part].write(ids, text.size, text.ends_document)
            done += text.size
        progress("encoding", done / total_bytes)


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
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model room "
            f"for {config.model.vocab_size}: set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _training_texts(corpus: Corpus, split: Split, wanted: int, progress: Progress) -> Iterator[str]:
    seen = 0
    for text in split.assign(corpus.documents()):
        seen += text.size
        progress("learning the vocabulary", min(1.0, seen / wanted))
        if text.part == TRAIN:
            yield text.text
        if seen >= wanted:
            return


def _batches(texts: Iterable[SplitText]) -> Iterator[list[SplitText]]:
    """Group texts so that each group has about `BATCH_CHARACTERS` characters."""
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


def _check_size(config: Config, corpus: Corpus, parts: dict[str, PartSummary]) -> None:
    block_length = config.model.max_seq_len
    if parts[TRAIN].tokens < block_length:
        raise DataError(
            f"{corpus.description} gives {parts[TRAIN].tokens} training tokens, fewer than one "
            f"block of {block_length}: use more text or a smaller model.max_seq_len"
        )
    if parts[VAL].tokens < 2:
        raise DataError(
            f"{corpus.description} leaves no text for validation: "
            "use more text or a larger data.val_fraction"
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
