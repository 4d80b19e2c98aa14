"""Live ranks that talk over MPI: how they work and fail, and what is said where MPI is missing."""

from __future__ import annotations

import signal
import threading
import time

import psutil
import pytest

from horovod_lm.jupyter.cluster import HorovodCluster
from horovod_lm.jupyter.mpi_engines import blamed, why_not_here
from horovod_lm.jupyter.outcome import RankError, RanksStopped
from horovod_lm.utils.errors import ConfigError, DistributedError
from tests.jupyter.conftest import children, needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]

SECONDS_TO_DETECT = 10
SUM = "int(hvd.allreduce(torch.ones(1), name='sum', op=hvd.Sum))"


def test_what_is_missing_is_said_before_anything_starts(monkeypatch):
    import horovod.torch as hvd

    before = children()
    monkeypatch.setattr(hvd, "mpi_built", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DistributedError, match="built with MPI: run python -m .* --mpi"):
        HorovodCluster(controller="mpi").start()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DistributedError, match="needs Open MPI, and there is no mpirun on PATH"):
        HorovodCluster(controller="mpi").start()
    assert children() == before


def test_a_controller_that_makes_no_sense_is_one_sentence():
    with pytest.raises(ConfigError, match='controller=\'nccl\': it is "gloo" or "mpi"'):
        HorovodCluster(controller="nccl")


@pytest.mark.parametrize(
    ("said", "rank_and_code"),
    [
        ("noticed that process rank 1 with PID 70 on node here exited on signal 9", {1: 137}),
        ("  Process name: [[61,1],2]\n  Exit code:    3\n", {2: 3}),
        ("", {}),
    ],
)
def test_whom_mpirun_blames(said, rank_and_code):
    assert blamed(said) == rank_and_code


@pytest.fixture(scope="module")
def cluster():
    reason = why_not_here()
    if reason:
        pytest.skip(reason)
    before = {child.pid for child in children()}
    with HorovodCluster(n=2, controller="mpi") as running:
        yield running
    wait_until(
        lambda: {child.pid for child in children()} <= before, 10, "the end of every process"
    )


def fails(cluster: HorovodCluster, source: str, error: type = RankError) -> BaseException:
    """Run a cell that fails, in time; then start the ranks again, with new processes."""
    before = set(cluster.run("__import__('os').getpid()"))
    started = time.monotonic()
    with pytest.raises(error) as caught:
        cluster.run_cell(source)
    assert time.monotonic() - started < SECONDS_TO_DETECT
    cluster.restart_ranks()
    assert cluster.run(SUM) == [2, 2]
    assert not any(map(psutil.pid_exists, before))
    return caught.value


def test_ranks_talk_over_mpi(cluster):
    assert cluster.run("(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.cross_size())") == [
        (0, 2, 0, 1), (1, 2, 1, 1)
    ]  # fmt: skip
    assert cluster.run("hvd.mpi_enabled() and not hvd.gloo_enabled()") == [True, True]
    assert cluster.run(SUM) == [2, 2]


def test_an_exception_is_its_own_rank_s(cluster):
    error = fails(cluster, "if hvd.rank() == 1:\n    1 / 0\nhvd.barrier()")
    assert str(error).startswith("rank 1: ZeroDivisionError: division by zero (line 3 of the cell)")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "words"),
    [("SIGKILL", "was killed by SIGKILL, exit code 137"), ("SIGSTOP", r"was stopped \(SIGSTOP\)")],
)
def test_a_dead_or_frozen_rank_is_named(cluster, rank, number, words):
    source = f"import os, signal\nif hvd.rank() == {rank}:\n    os.kill(os.getpid(), signal.{number})\nhvd.barrier()"  # noqa: E501
    with pytest.raises(RankError, match=f"^rank {rank} {words}.*rank {1 - rank} was ended with it"):
        raise fails(cluster, source)


def test_an_interrupt_ends_all(cluster):
    threading.Timer(1, signal.raise_signal, (signal.SIGINT,)).start()
    assert str(fails(cluster, "import time; time.sleep(100)", RanksStopped)).startswith("stopped")


def test_a_collective_that_one_rank_does_not_join(cluster):
    error = fails(cluster, "if hvd.rank() != 1: hvd.allreduce(torch.ones(1), name='lonely')")
    assert str(error).startswith("rank 1 did not come to 'lonely', where rank 0 waited for 6 s")
