"""A process beside each rank that kills the rank if it hangs.

The other ranks detect a dead rank at once, because its connections close. They detect a hung one
(stopped by a signal, swapped out, waiting for a disk) after the Gloo timeout. Elastic training then
still waits for it: horovodrun counts it among the next ranks until its process ends. A job with
fixed ranks ends, but horovodrun kills hung ranks on its own host only. Hence this process: the rank
sends it bytes, and is killed if none arrives within the time limit.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time

HEARTBEATS_PER_LIMIT = 10
SECONDS_BETWEEN_CHECKS = 1.0


class Watchdog:
    """Inside `with Watchdog(seconds, name):` this process is killed if it hangs for `seconds`.

    Args:
        seconds: the time limit.
        name: the name of this process in the message.
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
        while not self._ended.wait(self._seconds / HEARTBEATS_PER_LIMIT):
            try:
                os.write(self._pipe.fileno(), b".")
            except OSError:  # the watchdog was killed
                return


def watch(seconds: float, name: str) -> None:
    """Read the parent process's bytes; kill it if none arrives for `seconds`."""
    parent, last = os.getppid(), time.monotonic()
    while os.getppid() == parent:  # the number changes when the parent dies
        readable, _, _ = select.select([sys.stdin], [], [], SECONDS_BETWEEN_CHECKS)
        if readable:
            if not os.read(sys.stdin.fileno(), 4096):
                return  # the parent has closed its end
            last = time.monotonic()
        elif time.monotonic() - last > seconds:
            os.kill(parent, signal.SIGKILL)
            print(
                f"{name} (process {parent}) stood still for {seconds:g} s and was killed",
                file=sys.stderr,
                flush=True,
            )
            return


if __name__ == "__main__":
    watch(float(sys.argv[1]), sys.argv[2])
