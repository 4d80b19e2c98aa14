"""From token files to batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from horovod_lm.data.prepare import data_settings
from horovod_lm.data.sampler import ShardedBatchSampler
from horovod_lm.data.split import TRAIN, VAL
from horovod_lm.data.token_files import read_metadata
from horovod_lm.utils.config import Config, resolve_path
from horovod_lm.utils.distributed import get_rank, get_world_size, own_device
from horovod_lm.utils.errors import DataError

IGNORED_LABEL = -100  # what torch's cross entropy, and ours, leaves out

Batch = dict[str, torch.Tensor]


class TokenBlockDataset(Dataset[Batch]):
    """Windows of `block_length` tokens over a file of token ids, read where they are needed.

    Window i starts at token i * (block_length - 1): two windows share one token, the last of the
    one and the first of the other. The model predicts every token of a window but the first, so
    every token of the file but its first (an end-of-text) is predicted exactly once. The last
    window is filled up with `fill_id`; what is filled is no label.

    Args:
        path: the file.
        block_length: tokens per window, T.
        dtype: NumPy's name for the type of an id in the file.
        fill_id: fills the last window.
    """

    def __init__(
        self, path: str | Path, block_length: int, dtype: str = "<u2", fill_id: int = 0
    ) -> None:
        self.path, self.block_length = Path(path), block_length
        self.dtype, self.fill_id = dtype, fill_id
        self.num_tokens = self.path.stat().st_size // np.dtype(dtype).itemsize
        self._tokens: np.memmap | None = None

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // (self.block_length - 1))  # rounded up

    def __getitem__(self, index: int) -> Batch:
        """Return `input_ids` and `labels`, (T,) long; the model shifts the labels itself."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * (self.block_length - 1)
        window = torch.from_numpy(self.tokens[start : start + self.block_length].astype(np.int64))
        missing = self.block_length - len(window)
        if not missing:
            return {"input_ids": window, "labels": window.clone()}
        return {
            "input_ids": torch.cat([window, window.new_full((missing,), self.fill_id)]),
            "labels": torch.cat([window, window.new_full((missing,), IGNORED_LABEL)]),
        }

    @property
    def tokens(self) -> np.memmap:
        """All token ids, mapped and not read; each process maps the file for itself."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        # For a worker process: a pickled memmap would be a copy of the whole file.
        return {**self.__dict__, "_tokens": None}


def load_preprocessed_data(
    data_dir: str | Path = "notebooks/data/preprocessed/v1",
) -> tuple[TokenBlockDataset, TokenBlockDataset]:
    """Return the training and the validation windows of a folder that `prepare_data` made.

    Args:
        data_dir: the folder; a relative path starts at the project root.

    Raises:
        DataError: there are no prepared data.
    """
    folder = resolve_path(data_dir)
    return _datasets(folder, _metadata(folder, "configs/tiny.yaml"))


def get_dataloaders(
    config: Config, rank: int | None = None, world_size: int | None = None
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of this rank's training and validation batches.

    A batch holds `input_ids` and `labels`, (B, T) long, and B may be 0 in the last step of an
    epoch. The training loader's `batch_sampler` is a `ShardedBatchSampler`: call its `set_epoch`
    before each epoch.

    Args:
        config: the settings.
        rank: this process; default: what Horovod says.
        world_size: number of processes; default: what Horovod says.

    Raises:
        DataError: the data are not prepared, or were prepared with other settings.
    """
    rank = get_rank() if rank is None else rank  # Horovod: which share of each step is ours
    world_size = get_world_size() if world_size is None else world_size  # Horovod: of how many
    folder = config.resolve(config.data.data_dir)
    metadata = _metadata(folder, "FILE")
    _check_settings(config, metadata, folder)
    train_data, val_data = _datasets(folder, metadata)
    batch, seed = config.training.per_gpu_batch_size, config.seed
    accumulation = config.training.gradient_accumulation_steps
    train = ShardedBatchSampler(
        len(train_data), batch, accumulation, rank, world_size, seed, shuffle=True
    )
    val = ShardedBatchSampler(len(val_data), batch, 1, rank, world_size, seed, shuffle=False)
    return _loader(config, train_data, train), _loader(config, val_data, val)


def stack_blocks(samples: Sequence[Batch], block_length: int) -> Batch:
    """Return samples as one batch: `input_ids` and `labels`, (B, T) long; (0, T) for no samples."""
    if not samples:
        empty = torch.empty((0, block_length), dtype=torch.long)
        return {"input_ids": empty, "labels": empty.clone()}
    return {
        name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")
    }  # B x (T,) -> (B, T)


def _loader(config: Config, dataset: TokenBlockDataset, sampler: ShardedBatchSampler) -> DataLoader:
    workers = config.data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(stack_blocks, block_length=dataset.block_length),
        num_workers=workers,
        pin_memory=config.data.pin_memory and own_device(config.training.device).type == "cuda",
        persistent_workers=workers > 0,
        # Horovod: its threads and connections do not survive a fork; a fork server has none.
        multiprocessing_context="forkserver" if workers else None,
        # Its own generator: else each epoch drew from torch's, and a resumed run would differ.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _datasets(
    folder: Path, metadata: dict[str, Any]
) -> tuple[TokenBlockDataset, TokenBlockDataset]:
    length, dtype, fill = (
        metadata["block_length"],
        metadata["dtype"],
        metadata["tokenizer"]["eot_id"],
    )
    train, val = (
        TokenBlockDataset(folder / f"{part}.bin", length, dtype, fill) for part in (TRAIN, VAL)
    )
    return train, val


def _metadata(folder: Path, config_file: str) -> dict[str, Any]:
    metadata = read_metadata(folder)
    if metadata is None:
        raise DataError(
            f"there are no prepared data in {folder}: "
            f"run python -m horovod_lm.data --config {config_file}"
        )
    return metadata


def _check_settings(config: Config, metadata: dict[str, Any], folder: Path) -> None:
    """Refuse data that were prepared with other settings than the configuration's."""
    prepared = metadata["settings"]
    for key, wanted in data_settings(config).items():
        if prepared.get(key) != wanted:
            raise DataError(
                f"the data in {folder} were prepared with {key}={prepared.get(key, 'unset')}, and "
                f"the configuration has {wanted}: run python -m horovod_lm.data again with this "
                "configuration, or choose another data.data_dir"
            )
    tokens = metadata["tokenizer"]["vocab_size"]
    if tokens > config.model.vocab_size:
        raise DataError(
            f"the data in {folder} have {tokens} tokens and the model room for "
            f"{config.model.vocab_size}: set model.vocab_size={tokens} or more"
        )
