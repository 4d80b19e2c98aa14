"""One piece of work on several live ranks: waited for, watched, and shown rank by rank."""

from __future__ import annotations

import sys
import time
from typing import Any

import cloudpickle
from ipyparallel import AsyncResult
from ipyparallel.error import RemoteError

from horovod_lm.jupyter.live.engines import Engines
from horovod_lm.jupyter.run_cell.job_result import (
    JobResult,
    RankError,
    RanksStopped,
    StallReports,
    readable,
)

SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_BE_FREED = 7.0  # after a failure, before a rank that still waits is killed
SECONDS_FOR_OUTPUT = 2.0
SECONDS_FOR_EVENTS = 0.2  # until the supervisor has passed on what Horovod wrote


class Tasks:
    """The same work on several ranks.

    Args:
        engines: the ranks' engines.
        sent: ipyparallel's promise of each rank's answer, by rank.
    """

    def __init__(self, engines: Engines, sent: dict[int, AsyncResult]) -> None:
        self._engines, self._sent = engines, sent
        self._result = JobResult(engines.size, "the cell")
        self._pending = dict(sent)
        self._answers: dict[int, dict[str, Any]] = {}
        self._ended: dict[int, int] = {}
        self._kill_at = float("inf")
        self._output_before = {rank: len(engines.output(rank)) for rank in sent}

    def wait(self) -> RankError | RanksStopped | None:
        """Wait until no rank is busy; return what went wrong, if anything did.

        When the notebook is interrupted, so is every rank.
        """
        while self._pending:
            try:
                self._look()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            except KeyboardInterrupt:
                self._result.reason = "stopped"
                self._fail()
                self._engines.interrupt()
        self._look_at_engines()
        if self._kill_at == float("inf"):
            return None
        time.sleep(SECONDS_FOR_EVENTS)
        self._result.code = 1
        for rank, result in self._sent.items():
            self._read_horovods_log(rank, result)
        return self._result.error()

    def values(self) -> list[Any]:
        """Return each rank's value, in the order of ranks."""
        return [cloudpickle.loads(answer["value"]) for _, answer in sorted(self._answers.items())]

    def show(self) -> None:
        """Show what every rank has printed, rank by rank."""
        for rank, result in sorted(self._sent.items()):
            if rank in self._ended:
                continue
            result.wait_for_output(SECONDS_FOR_OUTPUT)
            reports = StallReports()
            for line in (result.stdout + result.stderr).splitlines():
                text = readable(line)
                # A stall that ends the ranks is in the error; one that has passed does not matter.
                if text and not reports.includes(text):
                    print(f"[{rank}] {text}")
            for output in result.outputs:
                _display(rank, output)
        sys.stdout.flush()

    def _fail(self) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + SECONDS_TO_BE_FREED)

    def _look(self) -> None:
        for rank, result in list(self._pending.items()):
            if result.ready():
                self._take(rank, result)
        self._look_at_engines()
        if time.monotonic() >= self._kill_at:
            for rank in self._pending:
                self._engines.kill(rank)

    def _take(self, rank: int, result: AsyncResult) -> None:
        try:
            answer = result.get(0)
        except RemoteError as error:
            if error.ename == "EngineError":  # it does not answer; its end is reported
                self._engines.kill(rank)
                return
            described = {"name": error.ename, "text": error.evalue, "line": None, "traceback": []}
            answer = {"error": described}
        del self._pending[rank]
        self._answers[rank] = answer
        if "error" in answer:
            self._result.errors[rank] = answer["error"]
            self._fail()

    def _look_at_engines(self) -> None:
        for rank, code in self._engines.ended().items():
            if rank in self._ended:
                continue
            self._ended[rank] = code
            self._pending.pop(rank, None)
            self._fail()
            if rank in self._engines.frozen:
                seconds = self._engines.frozen[rank]
                self._result.add({"event": "frozen", "rank": rank, "seconds": seconds})
            self._result.add({"event": "rank_ended", "rank": rank, "code": code})

    def _read_horovods_log(self, rank: int, result: AsyncResult) -> None:
        text = "" if rank in self._ended else result.stdout + result.stderr
        text += self._engines.output(rank)[self._output_before[rank] :]
        for line in text.splitlines(keepends=True):
            self._result.add({"event": "output", "rank": rank, "text": line})


def _display(rank: int, output: dict[str, Any]) -> None:
    """Show a picture or a table that a rank has displayed."""
    from IPython.display import publish_display_data

    print(f"[{rank}]")
    publish_display_data(output["data"], output.get("metadata", {}))
