"""From token files to batches: windows of tokens, and a sampler that shards them over the ranks."""

from __future__ import annotations

import atexit
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import weakref
from collections.abc import Iterator, Sequence
from functools import cache, partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from horovod_lm.data.prepare import data_settings, read_metadata
from horovod_lm.data.split import TRAIN, VAL
from horovod_lm.models.loss import IGNORE_INDEX
from horovod_lm.utils.config import Config, resolve_path
from horovod_lm.utils.distributed import choose_device, get_rank, get_world_size
from horovod_lm.utils.errors import ConfigError, DataError

Batch = dict[str, torch.Tensor]
PREFETCHED_BATCHES = 2  # by each worker


class TokenBlockDataset(Dataset[Batch]):
    """Windows of `block_length` tokens (T) over a memory-mapped file of ids of NumPy type `dtype`.

    Window i starts at token i * (T - 1): the last token of a window is the first of the next. The
    model predicts every token of a window except the first, so every token of the file except its
    first (an end-of-text) is predicted exactly once. The last window is padded with `fill_id`, and
    the labels of the padding are ignored.

    The file is opened once: if another one takes its place, the windows stay the same, also in
    worker processes.
    """

    def __init__(
        self, path: str | Path, block_length: int, dtype: str = "<u2", fill_id: int = 0
    ) -> None:
        self.path, self.block_length = Path(path), block_length
        self.dtype, self.fill_id = dtype, fill_id
        self._map(os.open(path, os.O_RDONLY))

    def _map(self, descriptor: int) -> None:
        """Map an open file, and close it with this object."""
        self._file = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.tokens = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), self.dtype)
        self.num_tokens = len(self.tokens)

    def __len__(self) -> int:
        return math.ceil((self.num_tokens - 1) / (self.block_length - 1))

    def __getitem__(self, index: int) -> Batch:
        """Return `input_ids` and `labels`, (T,) long; the model shifts the labels."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * (self.block_length - 1)
        tokens = torch.from_numpy(self.tokens[start : start + self.block_length].astype(np.int64))
        input_ids = torch.full((self.block_length,), self.fill_id)
        labels = torch.full((self.block_length,), IGNORE_INDEX)
        input_ids[: len(tokens)] = labels[: len(tokens)] = tokens
        return {"input_ids": input_ids, "labels": labels}

    def __getstate__(self) -> dict[str, Any]:
        # For a worker process: the open file instead of a copy of the tokens.
        return {**self.__dict__, "tokens": None, "_file": DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map(state["_file"].detach())


class ShardedBatchSampler(Sampler[list[int]]):
    """Shards samples over ranks and micro-batches: in an epoch, each sample is used once.

    All ranks draw the same permutation from (seed, epoch). Each optimizer step takes the next
    G = batch_size * gradient_accumulation_steps * world_size samples, cut into
    gradient_accumulation_steps * world_size pieces of nearly equal length; micro-batch m of rank r
    is piece m * world_size + r. Hence

    - every rank has the same number of micro-batches in a step, so no rank waits forever;
    - a step's samples depend only on G: one rank with batch 2B uses those of two ranks with B;
    - the last step may be smaller, its pieces even empty, but no sample is dropped or repeated.

    (`torch.utils.data.DistributedSampler` repeats samples to fill the last step.)

    Args:
        num_samples: samples in the dataset.
        batch_size: samples in a micro-batch of one rank.
        gradient_accumulation_steps: micro-batches of one rank in a step.
        rank: this process, from 0.
        world_size: number of processes.
        seed: determines the permutations.
        shuffle: False uses the samples in order.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
        if num_samples < 0 or batch_size < 1 or gradient_accumulation_steps < 1:
            raise ValueError("batch_size and gradient_accumulation_steps must be at least 1")
        self.num_samples, self.batch_size = num_samples, batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch = self.start = 0

    @property
    def samples_per_step(self) -> int:
        """Samples in a full optimizer step, over all ranks: G."""
        return self.batch_size * self.gradient_accumulation_steps * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch's permutation, from its first sample."""
        self.epoch, self.start = epoch, 0

    def set_start(self, samples_already_seen: int) -> None:
        """Skip the epoch's first samples: to resume, at this world size or another."""
        if not 0 <= samples_already_seen <= self.num_samples:
            raise ValueError(f"cannot skip {samples_already_seen} of {self.num_samples} samples")
        self.start = samples_already_seen

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in an iteration."""
        steps = math.ceil((self.num_samples - self.start) / self.samples_per_step)
        return steps * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        for first in range(self.start, self.num_samples, self.samples_per_step):
            step = order[first : first + self.samples_per_step]
            pieces = np.array_split(step, self.gradient_accumulation_steps * self.world_size)
            own = pieces[self.rank :: self.world_size]  # Horovod: each rank has its own samples
            for micro_batch in own:
                yield micro_batch.tolist()


def load_preprocessed_data(
    data_dir: str | Path = "notebooks/data/preprocessed/v1",
) -> tuple[TokenBlockDataset, TokenBlockDataset]:
    """Return the training and validation windows of a folder that `prepare_data` made.

    A relative path starts at the project root.

    Raises:
        DataError: the folder has no prepared data.
    """
    return _open(resolve_path(data_dir))[:2]


def get_dataloaders(
    config: Config, rank: int | None = None, world_size: int | None = None
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of this rank's training and validation batches.

    A batch holds `input_ids` and `labels`, (B, T) long; B may be 0 in the last step of an epoch.
    The training loader's `batch_sampler` is a `ShardedBatchSampler`: call its `set_epoch` before
    each epoch. `rank` and `world_size` are Horovod's by default.

    Raises:
        DataError: the data are not prepared, or were prepared with other settings.
        ConfigError: there is too little shared memory for `data.num_workers`.
    """
    rank = get_rank() if rank is None else rank  # Horovod: which shard of each step is ours
    world_size = get_world_size() if world_size is None else world_size  # Horovod: of how many
    train_data, val_data, metadata = _open(config.resolve(config.data.data_dir))
    _check_settings(config, metadata)
    _check_shared_memory(config)
    batch, seed = config.training.per_gpu_batch_size, config.seed
    accumulation = config.training.gradient_accumulation_steps
    train = ShardedBatchSampler(len(train_data), batch, accumulation, rank, world_size, seed)
    val = ShardedBatchSampler(len(val_data), batch, 1, rank, world_size, shuffle=False)
    return _loader(config, train_data, train), _loader(config, val_data, val)


def stack_blocks(samples: Sequence[Batch], block_length: int) -> Batch:
    """Stack samples to `input_ids` and `labels`, (B, T) long; (0, T) without samples."""
    names = ("input_ids", "labels")
    if not samples:
        return {name: torch.empty((0, block_length), dtype=torch.long) for name in names}
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def _loader(config: Config, dataset: TokenBlockDataset, sampler: ShardedBatchSampler) -> DataLoader:
    workers = config.data.num_workers
    if workers:
        _start_fork_server()
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(stack_blocks, block_length=dataset.block_length),
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=config.data.pin_memory and choose_device(config.training.device).type == "cuda",
        persistent_workers=workers > 0,
        # Horovod: its threads and connections do not survive a fork; a fork server has none.
        multiprocessing_context="forkserver" if workers else None,
        # Its own generator: otherwise each epoch would draw a number from torch's, and a resumed
        # run would differ.
        generator=torch.Generator().manual_seed(config.seed),
    )


@cache
def _start_fork_server() -> None:
    """Start the parent of worker processes with SIGTERM blocked, which the workers inherit.

    Slurm and horovodrun send SIGTERM to every process of a job, and a rank that is told to stop
    needs its workers until the end of the step.
    """
    resource_tracker.ensure_running()  # if it starts later, it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # At its exit, Python would send SIGTERM to the workers and wait for them.
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _check_shared_memory(config: Config) -> None:
    """Raise ConfigError where worker processes cannot pass batches on: torch would crash."""
    workers, folder = config.data.num_workers, Path("/dev/shm")
    if not workers or not folder.exists():
        return
    batch = 2 * 8 * config.training.per_gpu_batch_size * config.model.max_seq_len  # bytes
    needed = workers * PREFETCHED_BATCHES * batch + (1 << 20)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(
            f"data.num_workers={workers} needs {needed / 1e6:.1f} MB of shared memory, but"
            f" {folder} has {free / 1e6:.1f} MB: set data.num_workers=0, or give the container more"
            " (docker run --shm-size=1g)"
        )


def _open(folder: Path) -> tuple[TokenBlockDataset, TokenBlockDataset, dict[str, Any]]:
    """Return the training and validation windows and the metadata of prepared data."""
    metadata = read_metadata(folder)
    if metadata is None:
        raise DataError(f"there are no prepared data in {folder}: call prepare_data(config) first")
    layout = metadata["block_length"], metadata["dtype"], metadata["tokenizer"]["eot_id"]
    train, val = (TokenBlockDataset(folder / f"{part}.bin", *layout) for part in (TRAIN, VAL))
    return train, val, metadata


def _check_settings(config: Config, metadata: dict[str, Any]) -> None:
    """Raise DataError for data that were prepared with other settings."""
    folder, prepared = config.resolve(config.data.data_dir), metadata["settings"]
    for key, wanted in data_settings(config).items():
        before = prepared.get(key, "unset")
        if before != wanted:
            before = before if str(before).isprintable() else repr(before)
            raise DataError(
                f"the data in {folder} were prepared with {key}={before}, but "
                f"the configuration has {wanted}: call prepare_data(config) again, or choose "
                "another data.data_dir"
            )
    tokens = metadata["tokenizer"]["vocab_size"]
    if tokens > config.model.vocab_size:
        raise DataError(
            f"the data in {folder} have {tokens} different tokens, but model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size={tokens} or more"
        )
