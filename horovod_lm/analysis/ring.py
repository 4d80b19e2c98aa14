"""Ring allreduce: every step of it, simulated in one process.

Each of N workers has a tensor of the same length, cut into N chunks. In every step each worker
sends one chunk to the next worker of the ring:

1. reduce-scatter, N-1 steps: the receiver adds the chunk to its own. Then each worker has the sum
   of all workers for one chunk.
2. allgather, N-1 steps: the receiver replaces its chunk. Then each worker has all sums.

    states = ring_allreduce([torch.ones(6), torch.arange(6.0)])
    states[-1].result(worker=0)                      # the sum
    states[-1].numbers_sent                          # by each worker

Patarasu and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002, and the Horovod paper,
https://arxiv.org/abs/1802.05799. `horovod_lm.analysis.scaling` predicts the time of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

START, REDUCE_SCATTER, ALLGATHER = "start", "reduce-scatter", "allgather"


@dataclass(frozen=True)
class Message:
    """A chunk of `numbers` elements that `sender` sends to `receiver` in one step."""

    sender: int
    receiver: int
    chunk: int
    numbers: int


@dataclass(frozen=True)
class RingState:
    """The data of every worker after a step."""

    step: int  # number of completed steps, from 0 to 2(N-1)
    phase: str  # "start", "reduce-scatter" or "allgather"
    messages: tuple[Message, ...]  # of this step, by sender; none at the start
    chunks: tuple[tuple[Tensor, ...], ...]  # the data: chunks[worker][chunk]
    holds: tuple[tuple[frozenset[int], ...], ...]  # the workers whose data are summed in each chunk
    numbers_sent: tuple[int, ...]  # elements that each worker has sent since the start

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self.chunks)

    def result(self, worker: int) -> Tensor:
        """Return a worker's data, (length,); after the last step, the sum."""
        return torch.cat(self.chunks[worker])


def ring_allreduce(data: Sequence[Tensor]) -> list[RingState]:
    """Sum the workers' tensors with a ring allreduce; return every state.

    Args:
        data: one tensor (length,) per worker; not changed. Chunks differ in length by at most one
            element, and some are empty if there are fewer elements than workers.

    Returns:
        2(N-1) + 1 states, from the start to the sum.

    Raises:
        ValueError: there is no worker, or the tensors are not 1-D of equal length.
    """
    if not data or any(one.dim() != 1 or len(one) != len(data[0]) for one in data):
        shapes = ", ".join(str(tuple(one.shape)) for one in data) or "none"
        raise ValueError(f"ring_allreduce needs 1-D tensors of equal length, got {shapes}")
    workers = len(data)
    start = RingState(
        step=0,
        phase=START,
        messages=(),
        chunks=tuple(torch.tensor_split(one, workers) for one in data),
        holds=tuple((frozenset({worker}),) * workers for worker in range(workers)),
        numbers_sent=(0,) * workers,
    )
    states = [start]
    for _ in range(2 * (workers - 1)):
        states.append(_next(states[-1]))
    return states


def _next(state: RingState) -> RingState:
    """Let every worker send one chunk to the next worker, simultaneously."""
    workers, done = state.workers, state.step
    reducing = done < workers - 1
    chunks, holds = [list(one) for one in state.chunks], [list(one) for one in state.holds]
    messages, sent = [], list(state.numbers_sent)
    for sender in range(workers):
        receiver = (sender + 1) % workers
        # The first step sends the chunk with the worker's own number, each later step the chunk
        # that the worker has just received.
        chunk = (sender - done) % workers
        received, contributors = state.chunks[sender][chunk], state.holds[sender][chunk]
        if reducing:
            chunks[receiver][chunk] = state.chunks[receiver][chunk] + received
            holds[receiver][chunk] = state.holds[receiver][chunk] | contributors
        else:
            chunks[receiver][chunk], holds[receiver][chunk] = received, contributors
        messages.append(Message(sender, receiver, chunk, len(received)))
        sent[sender] += len(received)
    return RingState(
        step=done + 1,
        phase=REDUCE_SCATTER if reducing else ALLGATHER,
        messages=tuple(messages),
        chunks=tuple(map(tuple, chunks)),
        holds=tuple(map(tuple, holds)),
        numbers_sent=tuple(sent),
    )
