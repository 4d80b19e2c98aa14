"""A small process beside a rank that kills it when it hangs, so that the others can go on.

A rank that dies is missed at once: its connections close. One that stands still (stopped by a
signal, swapped out, waiting for a disk) is missed after the Gloo timeout, and even then elastic
training waits: horovodrun counts it among the ranks of the next world until its process has ended.
It cannot end itself, and the other ranks may be on other hosts. Hence this process: the rank sends
it a byte many times in the time limit, and no byte for the whole limit means that it hangs.

A job of a fixed number of ranks needs it on several hosts only. It ends without the rank that
stands still; but horovodrun, which kills what is left on its own host, ends only ssh on the others.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time

BEATS_IN_THE_LIMIT = 10
SECONDS_BETWEEN_LOOKS = 1.0


class Watchdog:
    """Inside `with Watchdog(seconds):` this process is killed when it stands still for so long.

    Args:
        seconds: the time limit.
        name: what to call this process when it is killed.
    """

    def __init__(self, seconds: float, name: str) -> None:
        self._seconds, self._name = seconds, name
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        command = [sys.executable, "-m", __name__, str(self._seconds), self._name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._pipe.close()
        self._process.wait()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / BEATS_IN_THE_LIMIT):
            try:
                os.write(self._pipe.fileno(), b".")
            except OSError:  # somebody killed the watchdog: this process goes on without one
                return


def watch(seconds: float, name: str) -> None:
    """Read what the parent process sends; kill it when nothing comes for `seconds`."""
    parent, last = os.getppid(), time.monotonic()
    while os.getppid() == parent:  # a process whose parent has died gets another one
        readable, _, _ = select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)
        if readable:
            if not os.read(sys.stdin.fileno(), 4096):
                return  # the parent has closed its end: all is well
            last = time.monotonic()
        elif time.monotonic() - last > seconds:
            os.kill(parent, signal.SIGKILL)
            print(
                f"{name} (process {parent}) stood still for {seconds:g} s: it was killed, so that"
                " the others can go on",
                file=sys.stderr,
                flush=True,
            )
            return


if __name__ == "__main__":
    watch(float(sys.argv[1]), sys.argv[2])
