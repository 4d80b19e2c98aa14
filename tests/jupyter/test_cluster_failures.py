"""Live ranks that fail: who is named, how soon, and that the same processes work afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from horovod_lm.jupyter.live.cluster import HorovodCluster
from horovod_lm.jupyter.run_cell.job_result import RankError, RanksStopped
from horovod_lm.utils.errors import DistributedError
from tests.conftest import FULL
from tests.jupyter.conftest import children, needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod, pytest.mark.slow]

SECONDS_TO_DETECT = 10
SUM = "int(hvd.allreduce(torch.ones(1), name='sum', op=hvd.Sum))"
HOW = "; cluster.restart_ranks() starts the ranks again"


@pytest.fixture(scope="module")
def cluster():
    with HorovodCluster(n=3) as running:
        yield running
    wait_until(lambda: children() == [], 10, "the end of every process")


@pytest.fixture
def fails(cluster, note_fault):
    """Run a cell that fails; the time to hear of it is part of every test."""

    def run(cluster: HorovodCluster, source: str, error: type = RankError) -> BaseException:
        cluster.run("before = hvd.rank()")
        started = time.monotonic()
        with pytest.raises(error) as caught:
            cluster.run_cell(source)
        seconds = time.monotonic() - started
        note_fault(seconds, caught.value)
        assert seconds < SECONDS_TO_DETECT
        with pytest.raises(DistributedError, match=r"the ranks have ended \(.*\); cluster.restart"):
            cluster.run("1")  # at once, instead of a wait
        return caught.value

    return run


def works_again(cluster: HorovodCluster, keep: list[int]) -> None:
    """The ranks work, and those that lived on still hold what they held."""
    pids = process_ids(cluster)
    cluster.restart_ranks()
    assert cluster.run(SUM) == [3, 3, 3]
    assert cluster.run("globals().get('before')") == [
        rank if rank in keep else None for rank in range(3)
    ]
    assert [process_ids(cluster)[rank] for rank in keep] == [pids[rank] for rank in keep]


def process_ids(cluster: HorovodCluster) -> list[int]:
    return [rank.process.pid for rank in cluster._ranks.values()]


@pytest.mark.parametrize("others", ["hvd.barrier()", "time.sleep(1); hvd.barrier()", "pass"])
def test_an_exception_shows_its_own_traceback_once(cluster, fails, others):
    source = f"import time\nif hvd.rank() == 1:\n    1 / 0\n{others}"
    error = fails(cluster, source)
    assert str(error) == (
        "rank 1: ZeroDivisionError: division by zero (line 4 of the cell);"
        f" ranks 0 and 2 were ended with it{HOW}"
    )
    shown = "\n".join(error._render_traceback_())
    assert shown.count("Traceback") == 1 and "    1 / 0\n" in shown
    works_again(cluster, keep=[0, 1, 2])


@pytest.mark.parametrize("rank", [1, 0][: None if FULL else 1])
def test_a_killed_rank(cluster, fails, rank):
    source = f"import os\nif hvd.rank() == {rank}:\n    os.kill(os.getpid(), 9)\nhvd.barrier()"
    error = fails(cluster, source)
    assert error.rank == rank and error.code == 137
    assert str(error).startswith(f"rank {rank} was killed by SIGKILL, exit code 137 (")
    assert str(error).endswith(f" were ended with it{HOW}")
    works_again(cluster, keep=[one for one in range(3) if one != rank])


def test_a_frozen_rank(cluster, fails):
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    error = fails(cluster, f"import os, signal\nif hvd.rank() == 2:\n    {stop}\nhvd.barrier()")
    assert str(error).startswith(
        "rank 2 was stopped (SIGSTOP), not woken for 3 s, and killed; ranks 0 and 1 were"
    )
    works_again(cluster, keep=[0, 1])


def test_a_rank_frozen_for_a_moment_only_is_waited_for(cluster):
    pid = process_ids(cluster)[1]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(1, os.kill, (pid, signal.SIGCONT)).start()
    assert cluster.run(SUM) == [3, 3, 3]


@pytest.mark.parametrize(
    "source",
    [
        "import time; time.sleep(100)",
        "import time\nif hvd.rank() == 0: time.sleep(100)\nhvd.barrier()",
        # Nobody is in Python then: each waits in Horovod for what the others do not do.
        "hvd.allreduce(torch.ones(1), name=f'of rank {hvd.rank()}')",
    ],
)
def test_an_interrupt_of_all(cluster, fails, source):
    threading.Timer(1, signal.raise_signal, (signal.SIGINT,)).start()
    error = fails(cluster, source, RanksStopped)
    assert str(error) == f"stopped by you: every rank of the cell was ended{HOW}"
    works_again(cluster, keep=[0, 1, 2])


def test_a_rank_that_is_missing_before_the_cell_runs(cluster):
    pid = process_ids(cluster)[2]
    cluster.run("before = hvd.rank()")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cluster._ranks[2].has_ended, 5, "the news of its end")
    started = time.monotonic()
    with pytest.raises(RankError, match="^rank 2 was killed by SIGKILL"):
        cluster.run(SUM)
    assert time.monotonic() - started < SECONDS_TO_DETECT
    works_again(cluster, keep=[0, 1])


def test_a_collective_that_one_rank_does_not_join(cluster, fails):
    error = fails(cluster, "if hvd.rank() != 1: hvd.allreduce(torch.ones(1), name='lonely')")
    assert str(error) == (
        "rank 1 did not come to 'lonely', where ranks 0 and 2 waited for 6 s: every rank must make"
        f" the same collective calls in the same order{HOW}"
    )
    works_again(cluster, keep=[0, 1, 2])


def test_an_exit_in_a_cell_is_an_error_of_its_rank_and_keeps_the_process(cluster, fails):
    error = fails(cluster, "import sys\nif hvd.rank() == 2: sys.exit(3)\nhvd.barrier()")
    assert str(error).startswith("rank 2: SystemExit: 3 (line 3 of the cell)")
    works_again(cluster, keep=[0, 1, 2])


def test_a_function_that_fails(cluster, fails):
    def divide(by: int) -> float:
        return 1 / by

    with pytest.raises(RankError, match="^every rank: ZeroDivisionError: division by zero;"):
        cluster.run(divide, 0)
    cluster.restart_ranks()
    assert cluster.run(divide, 2) == [0.5] * 3
