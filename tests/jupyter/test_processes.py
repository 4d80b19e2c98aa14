"""The supervisor on plain commands: what they print comes back as it is, and nothing is left."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from horovod_lm.jupyter.run_cell.job import JobProcess, JobSpec
from horovod_lm.jupyter.run_cell.processes import Processes
from tests.conftest import ROOT
from tests.jupyter.conftest import needs_horovod

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
SLEEP = "import time; print('up', flush=True); time.sleep(100)"


@pytest.fixture
def supervised(nothing_left):
    """Start Python code under a supervisor; return the processes and a reader of events."""
    started: list[Processes] = []

    def start(code: str, **options: Any) -> tuple[Processes, Callable[[str], dict[str, Any]]]:
        events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        processes = Processes(events.put)
        started.append(processes)
        processes.start("job", [sys.executable, "-c", code], **options)

        def until(kind: str) -> dict[str, Any]:
            """Return the next event of a kind, with all output up to it."""
            printed = ""
            while (event := events.get(timeout=20))["event"] != kind:
                printed += event.get("text", "")
            return {**event, "printed": printed + event.get("text", "")}

        return processes, until

    yield start
    for processes in started:
        processes.close()


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
    assert (ended["code"], ended["reason"], ended["left"]) == (3, "", [])


def test_a_python_that_prints_at_its_start_disturbs_nothing(supervised, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('welcome', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    _, until = supervised("print('done')")
    assert until("ended")["printed"] == "welcome\ndone\n"


@pytest.mark.parametrize("end", ["", "time.sleep(100)"])
def test_the_whole_tree_ends_a_daemon_that_ignores_sigterm_included(supervised, end):
    processes, until = supervised(DAEMON + end, grace_period=0.5)
    daemon = psutil.Process(int(until("output")["text"]))
    if end:
        processes.stop("job")
    ended = until("ended")
    assert ended["reason"] == ("stopped" if end else "") and ended["left"] == []
    assert ended["code"] == (128 + signal.SIGKILL if end else 0)
    assert not daemon.is_running()


def test_a_time_limit_and_a_later_stop(supervised):
    processes, until = supervised(SLEEP, limit=0.5)
    processes.stop("job", "failed", after=20)
    started = time.monotonic()
    ended = until("ended")
    # The first reason counts, the earliest time too.
    assert (ended["code"], ended["reason"]) == (128 + signal.SIGTERM, "failed")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("seconds", [0.5, None])
def test_a_stopped_process_may_be_continued_and_is_killed_otherwise(supervised, seconds):
    processes, until = supervised("import time; print('up', flush=True); time.sleep(4)")
    until("output")
    processes.signal("job", signal.SIGSTOP)
    if seconds is None:
        assert until("frozen")["seconds"] == 3
        assert until("ended")["code"] == 128 + signal.SIGKILL
    else:
        time.sleep(seconds)
        processes.signal("job", signal.SIGCONT)
        assert until("ended")["code"] == 0


def test_a_command_that_does_not_exist_has_ended(supervised):
    processes, until = supervised("pass")
    until("ended")
    processes.start("other", ["/nowhere/python"])
    ended = until("ended")
    assert (ended["code"], ended["name"]) == (127, "other")
    assert "/nowhere/python" in ended["printed"]


def test_a_supervisor_that_is_killed_ends_its_commands_with_a_sentence(supervised):
    processes, until = supervised(SLEEP)
    pid = processes.pids.get("job") or until("started")["pid"]
    os.kill(processes.supervisor, signal.SIGKILL)
    ended = until("ended")
    assert ended["printed"].endswith("its supervisor was killed\n")
    assert not psutil.pid_exists(pid)
    until("closed")


@needs_horovod
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_whose_reader_fails_ends_with_a_sentence(nothing_left):
    def fail(event: dict[str, Any]) -> None:
        if event["event"] in ("output", "closed"):
            raise ValueError("no more")

    echo = ["horovodrun", "-np", "1", "sh", "-c", "echo up; sleep 100"]
    job = JobProcess(JobSpec(1, echo), fail)
    assert str(job.wait(60).error()) == (
        "horovodrun could not run the cell: the reader of its events failed: ValueError: no more"
    )
