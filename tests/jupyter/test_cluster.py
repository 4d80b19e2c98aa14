"""Live ranks that work: what they show and return, and what they leave."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from horovod_lm.jupyter.live.cluster import HorovodCluster
from horovod_lm.utils.errors import ConfigError, DistributedError
from horovod_lm.utils.machine import available_cores
from tests.jupyter.conftest import children, wait_until

pytestmark = pytest.mark.horovod


@pytest.fixture(scope="module")
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.fixture(scope="module")
def cluster(shell, nothing_left_by_module):
    with HorovodCluster(n=2) as running:
        yield running


@pytest.fixture
def px(shell, cluster, capsys):
    """Run a `%%px` cell; return what it showed."""

    def run(line: str, body: str) -> str:
        capsys.readouterr()
        shell.run_cell(f"%%px {line}\n{body}").raise_error()
        return capsys.readouterr().out

    return run


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


def test_values_come_back_and_what_a_cell_defines_is_there_for_the_next_one(px, shell, cluster):
    px("", "kept = hvd.rank() * 10\ndef double(x):\n    return 2 * x")
    assert px("", "double(kept)") == "[0] 0\n[1] 20\n"
    assert px("", "double(kept);") == ""
    assert px("--out sizes", "print('on the way')\nhvd.rank() + 5") == (
        "[0] on the way\n[1] on the way\n"
    )
    assert shell.user_ns["sizes"] == [5, 6]
    assert cluster.run(lambda add, to: to + add, 1, to=2) == [3, 3]


def test_cores_are_shared_and_oversubscription_is_warned_about(cluster, capsys):
    share = max(1, available_cores() // 2)
    assert cluster.run("torch.get_num_threads()") == [share, share]
    cluster.threads = available_cores()
    cluster.restart_ranks()
    assert cluster.run("torch.get_num_threads()") == [available_cores()] * 2
    assert f"2 ranks with {available_cores()} threads each" in capsys.readouterr().err
    cluster.threads = None
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
    listening = {
        connection.laddr.ip
        for process in (psutil.Process(), *children())
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_mistakes_are_said_before_anything_is_sent(px):
    with pytest.raises(DistributedError, match="the cell is not Python"):
        px("", "a b")
    with pytest.raises(UsageError, match="unrecognized arguments: --what"):
        px("--what", "1")
    with pytest.raises(ConfigError, match="at least one rank"):
        HorovodCluster(n=0)
    with pytest.raises(DistributedError, match=r"not running: cluster.start\(\) starts it"):
        HorovodCluster(n=1).run("1")


def held() -> tuple[int, int, int]:
    """Return how many threads, listening ports and open files this process has."""
    me = psutil.Process()
    ports = [one for one in me.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    return threading.active_count(), len(ports), me.num_fds()


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
    wait_until(
        lambda: all(now <= then for now, then in zip(held(), before, strict=True)), 3, "the end"
    )
    assert list(tmp_path.iterdir()) == []
