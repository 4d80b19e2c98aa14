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
from tests.jupyter.conftest import wait_until

pytestmark = [pytest.mark.horovod, pytest.mark.slow]

SECONDS_TO_DETECT = 10
SUM = "int(hvd.allreduce(torch.ones(1), name='sum', op=hvd.Sum))"
HOW = "; cluster.restart_ranks() starts the ranks again"


@pytest.fixture(scope="module")
def cluster(nothing_left_by_module):
    with HorovodCluster(n=3) as running:
        yield running


@pytest.fixture
def fails(cluster, note_fault):
    """Run a cell that fails; the time to hear of it is part of every test."""

    def run(source: str, error: type = RankError) -> BaseException:
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


DIVIDE = "import time\nif hvd.rank() == 1:\n    1 / 0\n"
DIVIDED = (
    "rank 1: ZeroDivisionError: division by zero (line 4 of the cell);"
    f" ranks 0 and 2 were ended with it{HOW}"
)
KILL = "import os\nif hvd.rank() == {}:\n    os.kill(os.getpid(), {})\nhvd.barrier()"
KILLED = "was killed by SIGKILL, exit code 137 ("
FAULTS = {  # the cell, the beginning of the message, and the ranks that live on
    "exception": (f"{DIVIDE}hvd.barrier()", DIVIDED, [0, 1, 2]),
    "exception of the first": (f"{DIVIDE}time.sleep(1); hvd.barrier()", DIVIDED, [0, 1, 2]),
    "exception of one alone": (DIVIDE, DIVIDED, [0, 1, 2]),
    "exit": (
        "import sys\nif hvd.rank() == 2: sys.exit(3)\nhvd.barrier()",
        "rank 2: SystemExit: 3 (line 3 of the cell)",
        [0, 1, 2],
    ),
    "not joined": (
        "if hvd.rank() != 1: hvd.allreduce(torch.ones(1), name='lonely')",
        "rank 1 did not come to 'lonely', where ranks 0 and 2 waited for 6 s: every rank must make"
        f" the same collective calls in the same order{HOW}",
        [0, 1, 2],
    ),
    "frozen": (
        KILL.format(2, int(signal.SIGSTOP)),
        "rank 2 was stopped (SIGSTOP), not woken for 3 s, and killed; ranks 0 and 1 were",
        [0, 1],
    ),
    "killed": (KILL.format(1, 9), f"rank 1 {KILLED}", [0, 2]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_is_named(cluster, fails, fault):
    source, message, keep = FAULTS[fault]
    error = fails(source)
    assert str(error).startswith(message) and str(error).endswith(HOW)
    if message == DIVIDED:
        shown = "\n".join(error._render_traceback_())
        assert shown.count("Traceback") == 1 and "    1 / 0\n" in shown
    if KILLED in message:
        assert error.rank not in keep and error.code == 137
    works_again(cluster, keep)


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
    error = fails(source, RanksStopped)
    assert str(error) == f"stopped by you: every rank of the cell was ended{HOW}"
    works_again(cluster, keep=[0, 1, 2])


def test_a_rank_that_is_missing_before_the_cell_runs(cluster):
    cluster.run("before = hvd.rank()")
    os.kill(process_ids(cluster)[2], signal.SIGKILL)
    wait_until(lambda: cluster._ranks[2].has_ended, 5, "the news of its end")
    started = time.monotonic()
    with pytest.raises(RankError, match="^rank 2 was killed by SIGKILL"):
        cluster.run(SUM)
    assert time.monotonic() - started < SECONDS_TO_DETECT
    works_again(cluster, keep=[0, 1])


def test_a_function_that_fails(cluster):
    def divide(by: int) -> float:
        return 1 / by

    with pytest.raises(RankError, match="^every rank: ZeroDivisionError: division by zero;"):
        cluster.run(divide, 0)
    cluster.restart_ranks()
    assert cluster.run(divide, 2) == [0.5] * 3
