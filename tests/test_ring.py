"""The simulated ring gives the sum to everybody, in the steps and with the numbers it promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from horovod_lm.ring import (
    ALLGATHER,
    REDUCE_SCATTER,
    START,
    cut,
    ring_allreduce,
    ring_numbers_sent,
    star_numbers_sent,
)
from horovod_lm.scaling import Network

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
def test_everybody_ends_with_the_sum_and_their_data_stay(workers, length):
    data = whole_numbers(workers, length)
    kept = [one.clone() for one in data]
    last = ring_allreduce(data)[-1]
    for worker in range(workers):
        assert torch.equal(last.result(worker), torch.stack(kept).sum(dim=0))
        assert torch.equal(data[worker], kept[worker])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_workers_agree_to_the_last_bit_whatever_rounding_does(dtype):
    data = [(1000 * torch.randn(37, generator=torch.Generator().manual_seed(seed))).to(dtype)
            for seed in range(5)]  # fmt: skip
    last = ring_allreduce(data)[-1]
    assert last.result(0).dtype == dtype
    assert all(torch.equal(last.result(0), last.result(worker)) for worker in range(1, 5))
    torch.testing.assert_close(last.result(0), torch.stack(data).sum(dim=0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_steps_are_twice_as_many_as_neighbours(workers):
    states = ring_allreduce(whole_numbers(workers, 20))
    phases = [START, *[REDUCE_SCATTER] * (workers - 1), *[ALLGATHER] * (workers - 1)]
    assert [state.phase for state in states] == phases
    assert [state.step for state in states] == list(range(len(phases)))
    # In the middle each worker holds one finished chunk, and each chunk is finished somewhere.
    everybody = frozenset(range(workers))
    middle = states[workers - 1].holds
    finished = [[whose == everybody for whose in row] for row in middle]
    assert [sum(row) for row in finished] == [1] * workers
    assert [sum(column) for column in zip(*finished, strict=True)] == [1] * workers


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("workers", WORKERS)
def test_what_a_chunk_is_said_to_hold_is_what_it_holds(workers, length):
    data = whole_numbers(workers, length)
    pieces = [cut(one, workers) for one in data]
    for state in ring_allreduce(data):
        for row, whose_row in zip(state.chunks, state.holds, strict=True):
            for chunk, (numbers, whose) in enumerate(zip(row, whose_row, strict=True)):
                expected = sum(pieces[worker][chunk] for worker in whose)
                assert torch.equal(numbers, expected)


@pytest.mark.parametrize("workers", range(2, 9))
def test_each_worker_sends_one_chunk_to_the_next_in_every_step(workers):
    states = ring_allreduce(whole_numbers(workers, 21))
    for before, after in pairwise(states):
        messages = after.messages
        assert [one.sender for one in messages] == list(range(workers))
        assert all(one.receiver == (one.sender + 1) % workers for one in messages)
        for one in messages:
            assert one.numbers == len(before.chunks[one.sender][one.chunk])
            grown = after.numbers_sent[one.sender] - before.numbers_sent[one.sender]
            assert grown == one.numbers


@pytest.mark.parametrize("workers", WORKERS)
def test_the_numbers_sent_are_those_of_the_formula_and_of_the_cost_model(workers):
    length = 24 * workers  # even chunks
    sent = ring_allreduce(whole_numbers(workers, length))[-1].numbers_sent
    assert set(sent) == {ring_numbers_sent(length, workers)}
    # A link that takes a second for each number, and no time for a message.
    seconds = Network(latency=0, bandwidth=1).allreduce_seconds(length, workers)
    assert seconds == pytest.approx(sent[0])
    uneven = ring_allreduce(whole_numbers(workers, length + 1))[-1].numbers_sent
    assert sum(uneven) / workers == pytest.approx(ring_numbers_sent(length + 1, workers))


def test_the_star_sends_as_much_as_the_ring_for_two_and_far_more_for_many():
    assert star_numbers_sent(100, 1) == ring_numbers_sent(100, 1) == 0
    assert star_numbers_sent(100, 2) == ring_numbers_sent(100, 2) == 100
    assert star_numbers_sent(100, 8) == 700 and ring_numbers_sent(100, 8) == 175


@pytest.mark.parametrize(
    "data", [[], [torch.ones(2), torch.ones(3)], [torch.ones(2, 2)], [torch.tensor(1.0)]]
)
def test_workers_that_do_not_match_are_refused(data):
    with pytest.raises(ValueError, match="all of one length, not"):
        ring_allreduce(data)
