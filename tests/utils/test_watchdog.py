"""A process that stands still is killed; one that works, ends or dies is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

LIMIT = 3  # seconds
PROGRAM = f"""
import sys, time
from horovod_lm.utils.watchdog import Watchdog
with Watchdog({LIMIT}, "rank 7"):
    print("working", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def program():
    """Start the program; return it once its watchdog is there, and the watchdog."""
    started = []

    def start(seconds: float) -> tuple[subprocess.Popen, psutil.Process]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "working\n"
        started.append(process)
        return process, psutil.Process(process.pid).children()[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_process_that_stands_still_is_killed_and_named(program):
    process, watchdog = program(60)
    time.sleep(1)  # the first beat has come
    stopped = time.monotonic()
    os.kill(process.pid, signal.SIGSTOP)
    assert process.wait(LIMIT + 10) == -signal.SIGKILL
    assert time.monotonic() - stopped > LIMIT * 0.6
    assert f"rank 7 (process {process.pid}) stood still for {LIMIT} s" in process.stderr.read()
    psutil.wait_procs([watchdog], timeout=10)
    assert not watchdog.is_running() or watchdog.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_works_longer_than_the_limit_ends_by_itself(program):
    process, watchdog = program(LIMIT + 2)
    assert process.wait(30) == 0
    assert not watchdog.is_running()


def test_the_watchdog_of_a_process_that_died_ends(program):
    process, watchdog = program(60)
    process.kill()
    process.wait()
    psutil.wait_procs([watchdog], timeout=10)
    assert not watchdog.is_running() or watchdog.status() == psutil.STATUS_ZOMBIE
