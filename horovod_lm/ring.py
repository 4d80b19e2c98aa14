"""How workers add up their numbers round a ring: every step of it, simulated in one process.

Each of N workers brings as many numbers as the others, cut into N chunks. They stand in a ring, and
in every step each worker sends one chunk to the next one:

1. reduce-scatter, N-1 steps: a chunk is added to the receiver's. Then each worker holds the sum of
   everybody's numbers in one chunk.
2. allgather, N-1 steps: a chunk takes the place of the receiver's. Then everybody holds all sums.

    states = ring_allreduce([torch.ones(6), torch.arange(6.0)])
    states[-1].result(worker=0)                      # the sum
    states[-1].numbers_sent                          # by each worker

After Patarasu and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002, and the Horovod paper,
https://arxiv.org/abs/1802.05799. `horovod_lm.scaling` says what the steps cost in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

START, REDUCE_SCATTER, ALLGATHER = "start", "reduce-scatter", "allgather"


@dataclass(frozen=True)
class Message:
    """One chunk on its way.

    Attributes:
        sender: the worker that sends it.
        receiver: the next worker of the ring.
        chunk: which chunk it is.
        numbers: how many numbers it holds; 0 where there are fewer numbers than workers.
    """

    sender: int
    receiver: int
    chunk: int
    numbers: int


@dataclass(frozen=True)
class RingState:
    """What every worker holds after a step.

    Attributes:
        step: how many steps are done, from 0 to 2(N-1).
        phase: "start", "reduce-scatter" or "allgather".
        messages: what travelled in this step, by sender; none at the start.
        chunks: the numbers, as chunks[worker][chunk].
        holds: whose numbers are summed in them, as holds[worker][chunk].
        numbers_sent: by each worker, since the start.
    """

    step: int
    phase: str
    messages: tuple[Message, ...]
    chunks: tuple[tuple[Tensor, ...], ...]
    holds: tuple[tuple[frozenset[int], ...], ...]
    numbers_sent: tuple[int, ...]

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return len(self.chunks)

    def result(self, worker: int) -> Tensor:
        """Return all numbers that a worker holds, (length,); after the last step, the sum."""
        return torch.cat(self.chunks[worker])


def cut(data: Tensor, workers: int) -> tuple[Tensor, ...]:
    """Cut (length,) numbers into one chunk for each worker, the longer chunks first.

    Chunks differ by at most one number, and some are empty where there are fewer numbers than
    workers.
    """
    return tuple(torch.tensor_split(data, workers))


def ring_allreduce(data: Sequence[Tensor]) -> list[RingState]:
    """Sum the workers' numbers round a ring; return every state, the start included.

    Args:
        data: what each worker brings, (length,) each; it is not changed.

    Returns:
        2(N-1) + 1 states; `result` of the last one is the sum, for every worker.

    Raises:
        ValueError: there is no worker, or their tensors do not have one and the same length.
    """
    if not data or any(one.dim() != 1 or len(one) != len(data[0]) for one in data):
        shapes = ", ".join(str(tuple(one.shape)) for one in data) or "none"
        raise ValueError(f"each worker brings one row of numbers, all of one length, not {shapes}")
    workers = len(data)
    start = RingState(
        step=0,
        phase=START,
        messages=(),
        chunks=tuple(cut(one, workers) for one in data),
        holds=tuple((frozenset({worker}),) * workers for worker in range(workers)),
        numbers_sent=(0,) * workers,
    )
    states = [start]
    for _ in range(2 * (workers - 1)):
        states.append(_next(states[-1]))
    return states


def ring_numbers_sent(length: int, workers: int) -> float:
    """Return how many numbers each worker sends, on average: 2(N-1)/N of the length."""
    return 2 * (workers - 1) / workers * length


def star_numbers_sent(length: int, workers: int) -> int:
    """Return how many numbers the busiest worker sends, where one gathers all and sends the sum.

    That worker also receives as many, which in the ring everybody does.
    """
    return (workers - 1) * length


def _next(state: RingState) -> RingState:
    """Let every worker send one chunk to the next worker, all at the same time."""
    workers, done = state.workers, state.step
    reducing = done < workers - 1
    chunks, holds = [list(one) for one in state.chunks], [list(one) for one in state.holds]
    messages, sent = [], list(state.numbers_sent)
    for sender in range(workers):
        receiver = (sender + 1) % workers
        # First each sends the chunk of its own number, later the one that it has just received;
        # the second phase begins with the chunk whose sum is complete.
        chunk = (sender - done) % workers
        travelling, whose = state.chunks[sender][chunk], state.holds[sender][chunk]
        if reducing:
            chunks[receiver][chunk] = state.chunks[receiver][chunk] + travelling
            holds[receiver][chunk] = state.holds[receiver][chunk] | whose
        else:
            chunks[receiver][chunk], holds[receiver][chunk] = travelling, whose
        messages.append(Message(sender, receiver, chunk, len(travelling)))
        sent[sender] += len(travelling)
    return RingState(
        step=done + 1,
        phase=REDUCE_SCATTER if reducing else ALLGATHER,
        messages=tuple(messages),
        chunks=tuple(map(tuple, chunks)),
        holds=tuple(map(tuple, holds)),
        numbers_sent=tuple(sent),
    )
