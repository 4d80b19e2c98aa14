"""The processes of live ranks, and one request to all of them at once."""

from __future__ import annotations

import contextlib
import io
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from horovod_lm.jupyter.run_cell.job_result import JobResult, StallReports, readable
from horovod_lm.jupyter.run_cell.processes import SupervisedProcess
from horovod_lm.utils.errors import DistributedError, how_it_ended, last_line

RANK_LOOP = "horovod_lm.jupyter.live.rank_loop"
SECONDS_TO_START = 60.0
POLL_INTERVAL = 0.02  # seconds
SECONDS_TO_BE_FREED = 7.0  # after a failure, before a rank that still waits is killed
SECONDS_FOR_OUTPUT = 2.0  # after the answer


class LiveRank:
    """The process of a live rank, with its CPU threads; it ends with the notebook."""

    def __init__(self, number: int, threads: int) -> None:
        self.number = number
        self.events: list[dict[str, Any]] = []  # "frozen" and "rank_ended", for `JobResult`
        self.ended_at = math.inf  # as `time.monotonic` gives it; infinity while it lives
        self._text, self._lock = "", threading.Lock()
        self.connection, theirs = Pipe()
        paths = os.pathsep.join(path for path in sys.path if path)
        env = {"HOROVOD_RANK": str(number), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
        with theirs:
            self.process = SupervisedProcess(
                [sys.executable, "-m", RANK_LOOP, str(theirs.fileno())],
                self._hear, env, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return self.ended_at < math.inf

    def wait_until_ready(self) -> None:
        """Wait until it accepts requests.

        Raises:
            DistributedError: it ended before, or did not start in time.
        """
        deadline = time.monotonic() + SECONDS_TO_START
        while not self.has_ended:
            if self.receive() is not None:
                return
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"rank {self.number} did not start within {SECONDS_TO_START:g} s: call"
                    " cluster.stop() and cluster.start() when the machine has less to do"
                )
        how = how_it_ended(self.events[-1]["code"])
        why = last_line(self._text)
        raise DistributedError(f"rank {self.number} {how} before it was ready: {why}")

    def send(self, *request: Any) -> None:
        """Send a request."""
        with contextlib.suppress(OSError):  # it has just ended, and will be reported
            self.connection.send(request)

    def receive(self) -> Any:
        """Return the next answer; None: there is none yet, or the process is ending."""
        try:
            if self.connection.poll(POLL_INTERVAL):
                return self.connection.recv()
        except (EOFError, OSError):
            time.sleep(POLL_INTERVAL)
        return None

    def output(self, until: str) -> str:
        """Return what it has printed since the last call, up to a text that it prints itself."""
        deadline = time.monotonic() + SECONDS_FOR_OUTPUT
        while until not in self._text and not self.has_ended and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL / 10)
        with self._lock:
            printed, _, self._text = self._text.partition(until)
        return printed

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.close()

    def _hear(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._text += event.get("text", "")
        if event["event"] == "frozen":
            self.events.append({**event, "rank": self.number})
        elif event["event"] == "ended":
            self.events.append({"event": "rank_ended", "rank": self.number, "code": event["code"]})
            self.ended_at = time.monotonic()


def perform(
    ranks: Sequence[LiveRank], operation: str, arguments: Sequence[tuple[Any, ...]]
) -> JobResult:
    """Make one request to all live ranks, and wait until no rank is busy.

    If any rank has ended before, none is asked. When the notebook is interrupted, so is every rank.

    `operation` is a key of `rank_loop.OPERATIONS`; `arguments` are its arguments for each rank.
    """
    result, kill_at = JobResult(len(ranks)), math.inf
    asked = [] if any(rank.has_ended for rank in ranks) else ranks
    end_of_output = f"{secrets.token_hex(16)}\n"
    for rank, own in zip(asked, arguments, strict=False):
        rank.send(operation, own, end_of_output)

    def pending() -> list[LiveRank]:
        answered = result.values.keys() | result.errors.keys()
        return [rank for rank in asked if rank.number not in answered and not rank.has_ended]

    def has_failed() -> bool:
        return bool(result.errors) or result.was_stopped or any(rank.has_ended for rank in ranks)

    while busy := pending():
        try:
            ready = wait([rank.connection for rank in busy], POLL_INTERVAL)
            for rank in busy:
                if rank.connection in ready and (answer := rank.receive()) is not None:
                    result.take(rank.number, answer)
            if has_failed():
                kill_at = min(kill_at, time.monotonic() + SECONDS_TO_BE_FREED)
            if time.monotonic() >= kill_at:
                for rank in pending():
                    rank.process.signal(signal.SIGKILL)
        except KeyboardInterrupt:
            result.was_stopped = True
            for rank in ranks:
                rank.process.signal(signal.SIGINT)
    result.code = int(has_failed())
    for rank in sorted(ranks, key=lambda rank: rank.ended_at):
        for event in rank.events:
            result.add(event)
        # Not `splitlines`, which splits at more than newlines.
        for line in io.StringIO(rank.output(end_of_output)) if rank in asked else ():
            result.add({"event": "output", "rank": rank.number, "text": line})
    return result


def show(result: JobResult) -> None:
    """Print what the ranks that have answered have printed, rank by rank."""
    for rank in sorted(result.values.keys() | result.errors.keys()):
        reports = StallReports()
        for line in result.printed[rank]:
            text = readable(line.rstrip("\n"))
            # A stall that ends the ranks is in the error; one that has passed does not matter.
            if text and not reports.includes(text):
                print(f"[{rank}] {text}")
    sys.stdout.flush()
