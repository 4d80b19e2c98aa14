"""The simulated ring allreduce: sums, steps, messages, and the traffic of the cost model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from horovod_lm.analysis.ring import ALLGATHER, REDUCE_SCATTER, START, ring_allreduce
from horovod_lm.analysis.scaling import Network

WORKERS = range(1, 9)
LENGTHS = (0, 1, 2, 5, 8, 13, 840)


def whole_numbers(workers: int, length: int) -> list[torch.Tensor]:
    """Numbers whose sum is exact in any order."""
    generator = torch.Generator().manual_seed(100 * workers + length)
    return [
        torch.randint(-1000, 1000, (length,), generator=generator).double() for _ in range(workers)
    ]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("workers", WORKERS)
def test_every_worker_has_the_sum_and_every_chunk_what_holds_says(workers, length):
    data = whole_numbers(workers, length)
    kept = [one.clone() for one in data]
    states = ring_allreduce(data)
    for worker in range(workers):
        assert torch.equal(states[-1].result(worker), torch.stack(kept).sum(dim=0))
        assert torch.equal(data[worker], kept[worker])
    pieces = [torch.tensor_split(one, workers) for one in data]
    for state in states:
        for row, holds in zip(state.chunks, state.holds, strict=True):
            for chunk, (numbers, contributors) in enumerate(zip(row, holds, strict=True)):
                assert torch.equal(numbers, sum(pieces[worker][chunk] for worker in contributors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_workers_have_equal_bits_despite_rounding(dtype):
    data = [(1000 * torch.randn(37, generator=torch.Generator().manual_seed(seed))).to(dtype)
            for seed in range(5)]  # fmt: skip
    last = ring_allreduce(data)[-1]
    assert last.result(0).dtype == dtype
    assert all(torch.equal(last.result(0), last.result(worker)) for worker in range(1, 5))
    torch.testing.assert_close(last.result(0), torch.stack(data).sum(dim=0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("workers", WORKERS)
def test_phases_messages_and_finished_chunks(workers):
    states = ring_allreduce(whole_numbers(workers, 21))
    phases = [START, *[REDUCE_SCATTER] * (workers - 1), *[ALLGATHER] * (workers - 1)]
    assert [state.phase for state in states] == phases
    assert [state.step for state in states] == list(range(len(phases)))
    # After reduce-scatter each worker has one finished chunk, and each chunk is finished once.
    everybody = frozenset(range(workers))
    middle = states[workers - 1].holds
    finished = [[whose == everybody for whose in row] for row in middle]
    assert [sum(row) for row in finished] == [1] * workers
    assert [sum(column) for column in zip(*finished, strict=True)] == [1] * workers
    # In every step each worker sends one chunk to the next.
    for before, after in pairwise(states):
        for sender, one in enumerate(after.messages):
            assert (one.sender, one.receiver) == (sender, (sender + 1) % workers)
            assert one.numbers == len(before.chunks[sender][one.chunk])
            assert one.numbers == after.numbers_sent[sender] - before.numbers_sent[sender]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_traffic_is_that_of_the_cost_model_and_of_the_formula(workers):
    one_second_per_number = Network(latency=0, bandwidth=1)
    for length in (24 * workers, 24 * workers + 1):  # even and uneven chunks
        sent = ring_allreduce(whole_numbers(workers, length))[-1].numbers_sent
        seconds = one_second_per_number.allreduce_seconds(length, workers)
        assert sum(sent) / workers == pytest.approx(seconds)


@pytest.mark.parametrize("data", [[], [torch.ones(2), torch.ones(3)], [torch.tensor(1.0)]])
def test_workers_that_do_not_match_are_refused(data):
    with pytest.raises(ValueError, match="1-D tensors of equal length, got"):
        ring_allreduce(data)
