"""Live ranks that work: what they show and return, and what they leave."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from horovod_lm.analysis.timeline import read_timeline
from horovod_lm.jupyter.live.cluster import HorovodCluster
from horovod_lm.jupyter.run_cell.job_result import RankError
from horovod_lm.utils.errors import ConfigError, DistributedError
from tests.jupyter.conftest import children, held, needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]


@pytest.fixture(scope="module")
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.fixture(scope="module")
def cluster(shell):
    before = {child.pid for child in children()}
    with HorovodCluster(n=2) as running:
        yield running
    wait_until(
        lambda: {child.pid for child in children()} <= before, 10, "the end of every process"
    )


@pytest.fixture
def px(shell, cluster, capsys):
    """Run a `%%px` cell; return what it showed."""

    def run(line: str, body: str) -> str:
        capsys.readouterr()
        shell.run_cell(f"%%px {line}\n{body}").raise_error()
        return capsys.readouterr().out

    return run


def test_ranks_are_ready_and_hold_their_place(cluster):
    assert cluster.run("(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())") == [
        (0, 2, 0, 2), (1, 2, 1, 2)
    ]  # fmt: skip
    assert repr(cluster) == "<HorovodCluster of ranks 0 and 1: ready>"


def test_a_cell_shows_every_rank_in_order_and_always_alike(px):
    body = (
        "import sys, time\ntime.sleep(0.2 * (1 - hvd.rank()))\nfor line in range(2):\n"
        "    print(hvd.rank(), line)\nprint('warned', file=sys.stderr)\n"
        "hvd.allreduce(torch.ones(1) * hvd.rank(), name='mean')"
    )
    expected = "".join(
        f"[{rank}] {rank} 0\n[{rank}] {rank} 1\n[{rank}] warned\n[{rank}] tensor([0.5000])\n"
        for rank in range(2)
    )
    assert [px("", body) for _ in range(5)] == [expected] * 5


def test_a_wait_that_has_passed_is_not_reported(px):
    # What Horovod's stall check writes, printed: under pytest a kernel reads no other streams.
    body = (
        "print('[2026-11-25 18:52:01.5: W /src/stall_inspector.cc:107] One or more tensors were"
        " submitted to be reduced by subset of ranks')\n"
        "print('Missing ranks:')\nprint('1: [allreduce.late]')\nprint('they came')\n"
        "print('1: [0.5]')"
    )
    assert px("", body) == "[0] they came\n[0] 1: [0.5]\n[1] they came\n[1] 1: [0.5]\n"


def test_what_a_cell_defines_is_there_for_the_next_one(px, cluster):
    px("", "kept = hvd.rank() * 10\ndef double(x):\n    return 2 * x")
    assert px("", "double(kept)") == "[0] 0\n[1] 20\n"
    assert px("", "double(kept);") == ""


def test_values_come_back_by_rank(px, shell, cluster):
    assert px("--out sizes", "print('on the way')\nhvd.rank() + 5") == (
        "[0] on the way\n[1] on the way\n"
    )
    assert shell.user_ns["sizes"] == [5, 6]
    assert cluster.run(lambda add, to: to + add, 1, to=2) == [3, 3]
    cluster.push(secret=[1, 2])
    assert cluster.run("secret + [hvd.rank()]") == [[1, 2, 0], [1, 2, 1]]


def test_cores_are_shared_and_oversubscription_is_warned_about(cluster, capsys):
    from horovod_lm.utils.machine import available_cores

    share = max(1, available_cores() // 2)
    assert cluster.run("torch.get_num_threads()") == [share, share]
    cluster.threads = available_cores()
    cluster.restart_ranks()
    assert cluster.run("torch.get_num_threads()") == [available_cores()] * 2
    assert f"2 ranks with {available_cores()} threads each" in capsys.readouterr().err
    cluster.threads = None
    cluster.restart_ranks()


def test_ranks_form_groups_where_the_cluster_lets_them(cluster):
    form = "alone = hvd.add_process_set([1])\nalone.included()"
    with pytest.raises(RankError, match="Set HOROVOD_DYNAMIC_PROCESS_SETS=1"):
        cluster.run(form)
    cluster.process_sets = True
    cluster.restart_ranks()
    assert cluster.run(form) == [False, True]
    total = "hvd.allreduce(torch.ones(1), op=hvd.Sum, name='alone', process_set=alone).item()"
    assert cluster.run(f"{total} if alone.included() else None") == [None, 1.0]
    cluster.process_sets = False
    cluster.restart_ranks()


def test_bytes_that_a_cell_writes_to_any_pipe_break_nothing(cluster, capsys):
    def write() -> None:
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if int(link.name) > 2 and os.readlink(link).startswith("pipe:"):
                    os.write(int(link.name), b'{"event": "ended"}\nx\n')
        os.write(1, b"\xff\n[7]<stdout>:x\x1e")

    cluster.run(write)
    shown = "[{0}] \ufffd\n[{0}] [7]<stdout>:x\x1e\n"
    assert capsys.readouterr().out == shown.format(0) + shown.format(1)


def test_nothing_listens_beyond_the_loopback(cluster):
    process_tree = [psutil.Process(), *children()]
    listening = [
        connection.laddr
        for process in process_tree
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and {address.ip for address in listening} == {"127.0.0.1"}


def test_mistakes_are_said_before_anything_is_sent(px, cluster):
    with pytest.raises(DistributedError, match="the cell is not Python"):
        px("", "a b")
    with pytest.raises(UsageError, match="unrecognized arguments: --what"):
        px("--what", "1")
    with pytest.raises(ConfigError, match="at least one rank"):
        HorovodCluster(n=0)
    with pytest.raises(DistributedError, match=r"not running: cluster.start\(\) starts it"):
        HorovodCluster(n=1).run("1")


def test_a_restart_takes_settings_of_horovod(cluster, tmp_path):
    """Without fusion no tensor of a pair is copied into a buffer; by default both share one."""

    def phases(path) -> set[str]:
        cluster.restart_ranks({"HOROVOD_TIMELINE": str(path), **settings})
        cluster.run(
            "handles = [hvd.allreduce_async(torch.ones(9), name=name) for name in 'ab']\n"
            "_ = [hvd.synchronize(handle) for handle in handles], time.sleep(1)"
        )
        cluster.restart_ranks()
        assert cluster.run("os.environ.get('HOROVOD_TIMELINE')") == [None, None]
        return {span.phase for span in read_timeline(path)}

    cluster.run("import os, time")
    settings = {"HOROVOD_FUSION_THRESHOLD": "0"}
    alone = phases(tmp_path / "alone.json")
    # Half a second between two looks: both tensors are there at the first one.
    settings = {"HOROVOD_CYCLE_TIME": "500", "HOROVOD_FUSION_THRESHOLD": str(2**20)}
    fused = phases(tmp_path / "fused.json")
    assert "GLOO_ALLREDUCE" in alone & fused
    assert "MEMCPY_IN_FUSION_BUFFER" in fused - alone


# ---- nothing is left -----------------------------------------------------------------------------


@pytest.mark.slow
def test_starts_and_stops_leave_nothing(nothing_left, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with HorovodCluster(n=1):
        pass  # what is made once and kept: imports
    before = held()
    HorovodCluster(n=1).start()  # ended by the next one, as when a cell is run again
    with HorovodCluster(n=2) as cluster:
        assert cluster.run("hvd.size()") == [2, 2]
    assert held() == before
    assert list(tmp_path.iterdir()) == []
