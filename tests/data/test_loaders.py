"""Every token is predicted once, every sample is used by one rank, and resuming changes nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data import get_dataloaders, load_preprocessed_data, prepare_data
from horovod_lm.data.loaders import IGNORE_INDEX, ShardedBatchSampler, TokenBlockDataset
from horovod_lm.utils.errors import DataError
from tests.faults.test_damaged_files import IN_A_NAMESPACE, needs_namespaces


def ranks(num_samples, batch_size, accumulation, world_size, epoch=0, start=0, shuffle=True):
    """Return the batches of every rank, and the samplers."""
    samplers = [
        ShardedBatchSampler(num_samples, batch_size, accumulation, rank, world_size, 5, shuffle)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        sampler.set_start(start)
    return [list(sampler) for sampler in samplers], samplers


def steps(batches, accumulation):
    """Return the sorted samples of each optimizer step, over all ranks."""
    micro_batches = [sum(parts, []) for parts in zip(*batches, strict=True)]
    return [
        sorted(sum(micro_batches[first : first + accumulation], []))
        for first in range(0, len(micro_batches), accumulation)
    ]


@settings(deadline=None)
@given(num_samples=st.integers(0, 60), batch_size=st.integers(1, 4), accumulation=st.integers(1, 3))
def test_one_rank_steps_over_the_same_samples_as_two_and_four(
    num_samples, batch_size, accumulation
):
    alone, _ = ranks(num_samples, 4 * batch_size, accumulation, 1)
    two, _ = ranks(num_samples, 2 * batch_size, accumulation, 2)
    four, _ = ranks(num_samples, batch_size, accumulation, 4)
    accumulated, _ = ranks(num_samples, batch_size, 4 * accumulation, 1)
    expected = steps(alone, accumulation)
    assert steps(two, accumulation) == steps(four, accumulation) == expected
    assert steps(accumulated, 4 * accumulation) == expected


@settings(deadline=None)
@given(
    num_samples=st.integers(0, 60),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    other=st.integers(1, 4),
    done=st.integers(0, 20),
)
def test_resumed_equals_uninterrupted_and_at_another_world_size_uses_the_rest_once(
    num_samples, batch_size, accumulation, world_size, other, done
):
    whole, samplers = ranks(num_samples, batch_size, accumulation, world_size, epoch=3)
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in whole]
    assert all(len(batch) <= batch_size for batches in whole for batch in batches)
    sizes = [len(step) for step in steps(whole, accumulation)]
    assert all(size == samplers[0].samples_per_step for size in sizes[:-1])  # the last is smaller
    done = min(done, len(whole[0]) // accumulation)
    start = min(num_samples, done * samplers[0].samples_per_step)
    rest, resumed = ranks(num_samples, batch_size, accumulation, world_size, epoch=3, start=start)
    assert rest == [batches[done * accumulation :] for batches in whole]
    assert len(resumed[0]) == len(rest[0])

    before = [sample for step in steps(whole, accumulation)[:done] for sample in step]
    rest, _ = ranks(num_samples, batch_size, accumulation, other, epoch=3, start=start)
    after = [sample for batches in rest for batch in batches for sample in batch]
    assert sorted(before + after) == list(range(num_samples))


def test_each_epoch_has_its_own_order_and_starts_at_its_beginning():
    first, again, second = (ranks(100, 4, 1, 1, epoch)[0] for epoch in (0, 0, 1))
    assert first == again != second
    [unshuffled], [sampler] = ranks(100, 4, 1, 1, epoch=1, start=60, shuffle=False)
    assert sum(unshuffled, []) == list(range(60, 100)) and len(sampler) == 10
    sampler.set_epoch(2)
    assert len(list(sampler)) == len(sampler) == 25
    with pytest.raises(ValueError, match="cannot skip 101 of 100"):
        sampler.set_start(101)


@pytest.mark.parametrize("wrong", [{"rank": 2, "world_size": 2}, {"batch_size": 0}])
def test_invalid_samplers_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        ShardedBatchSampler(**{"num_samples": 10, "batch_size": 2, **wrong})


@settings(deadline=None, max_examples=50)
@given(num_tokens=st.integers(2, 100), block_length=st.integers(2, 20))
def test_every_token_but_the_first_is_predicted_exactly_once(
    tmp_path_factory, num_tokens, block_length
):
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    np.arange(1000, 1000 + num_tokens, dtype="<u2").tofile(path)
    dataset = TokenBlockDataset(path, block_length, fill_id=7)
    predicted = []
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample["input_ids"].shape == sample["labels"].shape == (block_length,)
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.long
        assert sample["input_ids"].data_ptr() != sample["labels"].data_ptr()
        real = sample["labels"] != IGNORE_INDEX
        assert torch.equal(sample["labels"][real], sample["input_ids"][real])
        assert (sample["input_ids"][~real] == 7).all()
        predicted += sample["labels"][1:][real[1:]].tolist()
    assert predicted == list(range(1001, 1000 + num_tokens))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_fault_11_every_rank_has_the_same_split(make_config, tmp_path):
    config = make_config(val_fraction=0.2)
    prepare_data(config)
    state = torch.get_rng_state()
    train = get_dataloaders(config)[0]
    assert (train.batch_sampler.rank, train.batch_sampler.world_size) == (0, 1)  # Horovod's answers
    assert train.pin_memory == torch.cuda.is_available()
    assert next(iter(train))["input_ids"].shape == (4, 16)

    loaders = [get_dataloaders(config, rank, 3) for rank in range(3)]
    for part, dataset in enumerate(load_preprocessed_data(tmp_path / "prepared")):
        batches = [batch["input_ids"] for pair in loaders for batch in pair[part]]
        seen = sorted(row for batch in batches for row in batch.tolist())
        assert seen == sorted(window["input_ids"].tolist() for window in dataset)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not used


def test_a_rank_without_samples_gets_an_empty_batch(make_config):
    config = make_config(num_stories=3, max_seq_len=300, batch=4)
    prepare_data(config)
    loaders = [get_dataloaders(config, rank, 4)[0] for rank in range(4)]
    batches = [batch for loader in loaders for batch in loader]
    assert len(batches) == 4
    assert sum(len(batch["input_ids"]) for batch in batches) == len(loaders[0].dataset) < 4
    assert batches[3]["input_ids"].shape == (0, 300)
    assert batches[3]["labels"].dtype == torch.long


def test_loaders_keep_their_tokens_when_others_are_prepared_also_in_worker_processes(make_config):
    prepare_data(make_config())
    expected = [batch["input_ids"] for batch in get_dataloaders(make_config(), 0, 1)[1]]
    loaders = [get_dataloaders(make_config(num_workers=n), 0, 1)[1] for n in (0, 1)]
    prepare_data(make_config(seed=8))
    for loader in loaders:
        batches = [batch["input_ids"] for batch in loader]
        assert all(torch.equal(one, other) for one, other in zip(expected, batches, strict=True))


def test_data_are_read_where_they_were_written_from_any_folder_and_fit_the_model(
    make_config, tmp_path, monkeypatch
):
    folder = tmp_path / "notebooks/data/preprocessed/v1"
    (tmp_path / "configs").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(DataError, match=rf"no prepared data in {folder}: call prepare_data\(conf"):
        load_preprocessed_data()
    prepare_data(make_config(data_dir=str(folder)))
    train, val = load_preprocessed_data()
    assert train[0]["input_ids"].shape == val[0]["input_ids"].shape == (16,)
    small = make_config(vocab_size=200, data_dir=str(folder))
    with pytest.raises(DataError, match="257 different tokens, but model.vocab_size is 200"):
        get_dataloaders(small, 0, 1)


LOADERS = """
import sys
from horovod_lm.data import get_dataloaders
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.config import load_config
config = load_config("configs/tiny.yaml", ["data.num_workers=2"])
run_cli(lambda _: get_dataloaders(config, 0, 1) and 0)
"""


@needs_namespaces
def test_too_little_shared_memory_for_workers_is_one_sentence(tiny_project):
    mount = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
    command = [*IN_A_NAMESPACE, "sh", "-c", mount, "sh", sys.executable, "-c", LOADERS]
    done = subprocess.run(command, cwd=tiny_project, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: data.num_workers=2 needs 1.1 MB of shared memory, but")
