"""A process that hangs is killed; one that works, ends or crashes is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from horovod_lm.utils.watchdog import SECONDS_TO_END

LIMIT = 3  # seconds
PROGRAM = f"""
import signal, sys, time
from horovod_lm.utils.watchdog import Watchdog
signal.signal(signal.SIGTERM, lambda *_: None)
works, saves = map(float, sys.argv[1:])
started = time.monotonic()
with Watchdog({LIMIT}, "rank 7", lambda: time.monotonic() < started + saves):
    print("working", flush=True)
    time.sleep(works)
"""


@pytest.fixture
def program():
    """Start the program; return it once its watchdog is there, and the watchdog."""
    started = []

    def start(works: float, saves: float = 0) -> tuple[subprocess.Popen, psutil.Process]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(works), str(saves)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HOROVOD_GLOO_RENDEZVOUS_ADDR": "localhost"},
        )  # fmt: skip
        assert process.stdout.readline() == "working\n"
        started.append(process)
        return process, psutil.Process(process.pid).children()[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


def assert_ends(watchdog: psutil.Process) -> None:
    psutil.wait_procs([watchdog], timeout=10)
    assert not watchdog.is_running() or watchdog.status() == psutil.STATUS_ZOMBIE


def test_a_hung_process_is_killed_and_one_that_works_ends_by_itself(program):
    (frozen, watchdog), (works, _) = program(60), program(LIMIT + 2)
    time.sleep(1)  # the first beat has come
    stopped = time.monotonic()
    os.kill(frozen.pid, signal.SIGSTOP)
    assert frozen.wait(LIMIT + 10) == -signal.SIGKILL
    assert time.monotonic() - stopped > LIMIT * 0.6
    assert f"rank 7 (process {frozen.pid}) stood still for {LIMIT} s" in frozen.stderr.read()
    assert_ends(watchdog)
    assert works.wait(30) == 0


def test_a_process_that_does_not_end_when_it_is_told_to_is_killed_unless_it_saves(program):
    started = [program(60), program(60), program(9, saves=9), program(60, saves=6)]
    told, unread, saves, saved = (process for process, _ in started)
    for process in (told, saves, saved):
        process.terminate()
    unread.stderr.close()  # as horovodrun on another host does
    for process in (told, unread):
        assert process.wait(SECONDS_TO_END + 5) == -signal.SIGKILL
    assert saved.poll() is None
    assert saved.wait(SECONDS_TO_END + 5) == -signal.SIGKILL
    assert f"rank 7 (process {told.pid}) did not end within" in told.stderr.read()
    assert saves.wait(30) == 0


def test_the_watchdog_of_a_process_that_died_ends(program):
    process, watchdog = program(60)
    process.kill()
    process.wait()
    assert_ends(watchdog)
