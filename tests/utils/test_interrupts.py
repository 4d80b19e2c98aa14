"""Ctrl-C is a request first, and an interrupt the second time."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from horovod_lm.utils.interrupts import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_a_second_one_an_interrupt(number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), number)
        pytest.fail("the second signal did nothing")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            stop.requested = True  # as a cell's stop button does
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True] and signal.getsignal(signal.SIGINT) is before
