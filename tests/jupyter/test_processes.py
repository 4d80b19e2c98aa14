"""Plain commands with a supervisor: their output comes back unchanged, and nothing is left."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from horovod_lm.jupyter.run_cell.horovodrun_job import JobProcess, JobSpec
from horovod_lm.jupyter.run_cell.processes import SupervisedProcess
from tests.jupyter.conftest import wait_until

# A grandchild in a session of its own, whose parent has ended: no process group finds it.
DAEMON = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(100)
    os._exit(0)
os.wait()
"""
KERNEL = """
import os, sys, time
from horovod_lm.jupyter.run_cell.processes import SupervisedProcess
process = SupervisedProcess(["sleep", "100"], lambda event: None)
while process.pid is None:
    time.sleep(0.01)
print(process.pid, flush=True)
"""


@pytest.fixture
def supervised(nothing_left):
    """Start Python code; return its process and a reader of events."""
    started: list[SupervisedProcess] = []

    def start(code: str, **options: Any):
        events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        process = SupervisedProcess([sys.executable, "-c", code], events.put, **options)
        started.append(process)

        def until(kind: str) -> dict[str, Any]:
            """Return the next event of a kind, with all output up to it."""
            printed = ""
            while (event := events.get(timeout=20))["event"] != kind:
                printed += event.get("text", "")
            return {**event, "printed": printed + event.get("text", "")}

        return process, until

    yield start
    for process in started:
        process.close()


def test_output_comes_back_as_it_is_whatever_it_holds(supervised):
    code = r"""
import sys
print('{"event": "ended", "code": 0}\n[7]<stdout>:hello\x1e \r\n', end='', flush=True)
sys.stdout.buffer.write(b"\xff\xe2\x82\xac")
sys.exit(3)
"""
    _, until = supervised(code)
    ended = until("ended")
    assert ended["printed"] == (
        '{"event": "ended", "code": 0}\n[7]<stdout>:hello\x1e \r\n\N{REPLACEMENT CHARACTER}€'
    )
    assert (ended["code"], ended["stopped"]) == (3, False)


@pytest.mark.parametrize("end", ["", "time.sleep(100)"])
def test_the_whole_tree_ends_a_daemon_that_ignores_sigterm_included(supervised, end):
    process, until = supervised(DAEMON + end, grace_period=0.5)
    daemon = psutil.Process(int(until("output")["text"]))
    if end:
        process.stop()
    ended = until("ended")
    assert ended["stopped"] == bool(end)
    assert ended["code"] == (128 + signal.SIGKILL if end else 0)
    assert not daemon.is_running()


def test_a_rank_stopped_for_a_moment_is_waited_for_and_killed_after_a_while(supervised):
    code = "import time; print('up', flush=True); time.sleep(100)"
    process, until = supervised(code, env={"HOROVOD_RANK": "1"})
    assert until("rank_started")["rank"] == 1
    process.signal(signal.SIGSTOP)
    time.sleep(1)
    process.signal(signal.SIGCONT)
    time.sleep(2.5)
    process.signal(signal.SIGSTOP)
    frozen = until("frozen")
    assert (frozen["rank"], frozen["seconds"]) == (1, 3)
    assert until("ended")["code"] == 128 + signal.SIGKILL


@pytest.mark.parametrize("end", ["", "os.kill(process.pid, 19)\nos.kill(os.getpid(), 9)"])
def test_a_command_ends_with_its_kernel_also_one_that_is_frozen(end):
    kernel = [sys.executable, "-c", KERNEL + end]
    command = subprocess.run(kernel, stdout=subprocess.PIPE, text=True).stdout
    wait_until(lambda: not psutil.pid_exists(int(command)), 10, "its end")


@pytest.mark.horovod
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_whose_reader_fails_ends_with_a_sentence(nothing_left, tmp_path):
    heard: list[str] = []

    def fail(event: dict[str, Any]) -> None:
        heard.append(event["event"])
        if event["event"] in ("output", "ended"):
            raise ValueError("no more")

    echo = ["horovodrun", "-np", "1", "sh", "-c", "echo up; sleep 100"]
    (tmp_path / "report.x").touch()  # no report: it cannot be read
    job = JobProcess(JobSpec(1, echo, cell_folder=tmp_path), fail)
    error = job.wait(60).error()
    job._process.close()  # the reader's thread fails once more, and the filter is for this test
    assert str(error) == (
        "horovodrun could not run the cell: the reader of its events failed: ValueError: no more"
    )
    assert heard[-1] == "ended"
