"""Ctrl-C is a request first, and an interrupt the second time."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from horovod_lm.utils.interrupts import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ON_A_TERMINAL = """
import signal, sys, time
from horovod_lm.utils.interrupts import StopRequest
from horovod_lm.utils.progress import ProgressLine
with StopRequest() as stop:
    line = ProgressLine()
    line.say("started")
    while not stop.requested:
        time.sleep(0.01)
    line.say("stopped")
    print("the summary")
    open(sys.argv[1], "w").write("saved")
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_a_second_one_an_interrupt(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), number)
        pytest.fail("the second signal did nothing")
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(StopRequest().__enter__).result()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_nohup_or_a_script_ignores_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert not stop.requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_stops_the_work_and_what_it_prints_is_no_error(tmp_path):
    here, there = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "result")]
    terminal = {"stdin": there, "stdout": there, "stderr": there}
    with subprocess.Popen(["setsid", "--ctty", *command], **terminal) as process:
        os.close(there)
        with open(here, "rb") as shown:
            assert shown.readline() == b"started\r\n"
        assert process.wait(10) == 0
    assert (tmp_path / "result").read_text() == "saved"
