"""A process beside each rank that kills the rank if it hangs.

The other ranks detect a dead rank at once, because its connections close. They detect a hung one
(stopped by a signal, swapped out, waiting for a disk) after the Gloo timeout. Elastic training then
still waits for it: horovodrun counts it among the next ranks until its process ends. A job with
fixed ranks ends, but horovodrun waits 30 s more for a hung rank, and cannot kill one on another
host.
Hence this process: the rank sends it bytes, and is killed if none arrives within the time limit.

It also kills a rank that hangs in one call, while its other threads work, and does not react when
it is told to end. On its own host, horovodrun sends it SIGTERM, and would wait 30 s before it kills
it. On another host it closes the connection, and nobody reads the rank's output any more. A rank
that saves is not killed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

HEARTBEATS_PER_LIMIT = 10
SECONDS_BETWEEN_CHECKS = 0.5
MAX_SECONDS_BETWEEN_HEARTBEATS = 1.0
SECONDS_TO_END = 4.0  # after SIGTERM, or after a save that was not complete then
HEARTBEAT, SAVING = b".", b"!"


class Watchdog:
    """Inside `with Watchdog(...):` this process is killed if it hangs for `seconds`.

    The message calls it `name`. `is_saving` returns whether it writes a checkpoint.
    """

    def __init__(self, seconds: float, name: str, is_saving: Callable[[], bool]) -> None:
        self._seconds, self._name, self._is_saving = seconds, name, is_saving
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        command = [sys.executable, "-m", __name__, str(self._seconds), self._name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)
        with suppress(ValueError):  # not in the main thread
            # Python writes the numbers of signals there, also while the main thread hangs.
            signal.set_wakeup_fd(self._pipe.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
        self._pipe.close()
        self._process.wait()

    def _beat(self) -> None:
        pause = min(self._seconds / HEARTBEATS_PER_LIMIT, MAX_SECONDS_BETWEEN_HEARTBEATS)
        while not self._ended.wait(pause):
            try:
                os.write(self._pipe.fileno(), SAVING if self._is_saving() else HEARTBEAT)
            except OSError:  # the watchdog was killed
                return


def watch(seconds: float, name: str) -> None:
    """Kill the parent if it sends no byte for `seconds`, or does not end when told to."""
    parent, last, told_to_end = os.getppid(), time.monotonic(), float("inf")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to every process of a job
    by_horovodrun = (
        "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ
    )
    events = select.poll()
    events.register(sys.stdin, select.POLLIN)
    if by_horovodrun:
        events.register(sys.stderr, 0)  # only errors: the pipe has no reader
    while os.getppid() == parent:  # the number changes when the parent dies
        ready = dict(events.poll(1000 * SECONDS_BETWEEN_CHECKS))
        now = time.monotonic()
        if sys.stderr.fileno() in ready:
            events.unregister(sys.stderr)
            told_to_end = min(told_to_end, now)
        if sys.stdin.fileno() in ready:
            received = os.read(sys.stdin.fileno(), 4096)
            if not received:
                return  # the parent has closed its end
            last = now
            if signal.SIGTERM in received and by_horovodrun:
                told_to_end = min(told_to_end, now)
            if SAVING in received:  # infinity, if it was not told to end, remains
                told_to_end = max(told_to_end, now)
        if now - last > seconds:
            why = f"stood still for {seconds:g} s"
        elif now - told_to_end > SECONDS_TO_END:
            why = f"did not end within {SECONDS_TO_END:g} s of SIGTERM"
        else:
            continue
        os.kill(parent, signal.SIGKILL)
        with suppress(OSError):  # the pipe has no reader
            print(f"{name} (process {parent}) {why} and was killed", file=sys.stderr, flush=True)
        return


if __name__ == "__main__":
    watch(float(sys.argv[1]), sys.argv[2])
