"""Which rank sees which samples, and when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ShardedBatchSampler(Sampler[list[int]]):
    """Shares samples out to ranks and micro-batches: in an epoch, each sample is seen once.

    All ranks draw the same permutation from (seed, epoch). Each optimizer step takes the next
    G = batch_size * gradient_accumulation_steps * world_size of it, cut into
    gradient_accumulation_steps * world_size pieces of nearly equal length; micro-batch m of rank r
    is piece m * world_size + r. Hence

    - every rank has as many micro-batches in a step as any other, and none waits for ever;
    - a step's samples depend on G alone: one rank with batch 2B sees what two ranks with B see;
    - the last step may be smaller, its pieces even empty, but no sample is lost or repeated.

    (`torch.utils.data.DistributedSampler` repeats samples to fill the last step.)

    Args:
        num_samples: samples in the dataset.
        batch_size: samples in a micro-batch of one rank.
        gradient_accumulation_steps: micro-batches of one rank in a step.
        rank: this process, from 0.
        world_size: number of processes.
        seed: the permutations follow from it.
        shuffle: False takes the samples in their order.
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
            raise ValueError(f"rank {rank} is not one of {world_size}")
        if num_samples < 0 or batch_size < 1 or gradient_accumulation_steps < 1:
            raise ValueError(
                "a sampler needs a batch size and accumulation of 1 or more, and samples"
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.start = 0, 0

    @property
    def samples_per_step(self) -> int:
        """Samples in a full optimizer step, over all ranks: G."""
        return self.batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return -(-self.num_samples // self.samples_per_step)  # rounded up

    @property
    def steps_left(self) -> int:
        """Optimizer steps that iterating will give: fewer than an epoch's after `set_start`."""
        return -(-(self.num_samples - self.start) // self.samples_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's permutation, from its first sample on."""
        self.epoch, self.start = epoch, 0

    def set_start(self, samples_already_seen: int) -> None:
        """Start after the epoch's first samples: to resume, at this world size or another."""
        if not 0 <= samples_already_seen <= self.num_samples:
            raise ValueError(
                f"cannot start after {samples_already_seen} of {self.num_samples} samples"
            )
        self.start = samples_already_seen

    def __len__(self) -> int:
        """Return the number of micro-batches that iterating will give to this rank."""
        return self.steps_left * self.gradient_accumulation_steps

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
