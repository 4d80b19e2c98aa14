"""One piece of work on several live ranks: waited for, watched, and shown rank by rank."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
from ipyparallel.error import RemoteError

from horovod_lm.jupyter.engines import name_of
from horovod_lm.jupyter.magics import readable
from horovod_lm.jupyter.outcome import Outcome, RankError, RanksStopped, without_stalls
from horovod_lm.jupyter.processes import Processes

SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_FROZEN = 2.0  # a rank that somebody froze gets so long to be woken again
SECONDS_TO_BE_FREED = 7.0  # after a failure, before a rank that still waits is killed
SECONDS_FOR_OUTPUT = 2.0


class Tasks:
    """The same work on several ranks.

    Args:
        sent: ipyparallel's promise of each rank's answer, by rank.
        size: how many ranks there are.
        processes: those of this host's ranks, or None where they are not ours.
        missing: ranks whose engines were gone before anything was sent.
    """

    def __init__(
        self,
        sent: dict[int, Any],
        size: int,
        processes: Processes | None,
        missing: Sequence[int] = (),
    ) -> None:
        self._sent, self._processes = sent, processes
        self._outcome = Outcome(size, "the cell")
        self._size = size
        self._pending = dict(sent)
        self._reports: dict[int, Any] = {}
        self._gone: set[int] = set()
        self._ended: set[int] = set()
        self._free_at = float("inf")
        self._logs = {rank: len(self._log(rank)) for rank in sent}
        for rank in missing:
            self._lose(rank)

    def wait(self, interrupt: Callable[[], None]) -> RankError | RanksStopped | None:
        """Wait until no rank is busy; return what went wrong, if anything did.

        Args:
            interrupt: called when the notebook is interrupted; interrupts every rank.
        """
        while self._pending:
            try:
                self._look()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            except KeyboardInterrupt:
                self._outcome.reason = "stopped"
                self._fail()
                interrupt()
        self._look_at_processes()
        if self._failed:
            self._outcome.code = 1
            for rank, result in self._sent.items():
                self._hear_horovod(rank, result)
            return self._outcome.error()
        return None

    def values(self) -> list[Any]:
        """Return each rank's value, in the order of ranks."""
        return [cloudpickle.loads(report["value"]) for _, report in sorted(self._reports.items())]

    def show(self) -> None:
        """Show what every rank has printed, rank by rank."""
        for rank, result in sorted(self._sent.items()):
            if rank in self._gone:
                continue
            result.wait_for_output(SECONDS_FOR_OUTPUT)
            # The error at the cell's end says a stall better; one that has passed is no news.
            for text in without_stalls(map(readable, _streams(result).splitlines())):
                if text:
                    print(f"[{rank}] {text}")
            for output in result.outputs:
                _display(rank, output)
        sys.stdout.flush()

    @property
    def _failed(self) -> bool:
        return self._free_at < float("inf")

    def _fail(self) -> None:
        self._free_at = min(self._free_at, time.monotonic() + SECONDS_TO_BE_FREED)

    def _look(self) -> None:
        for rank, result in list(self._pending.items()):
            if result.ready():
                del self._pending[rank]
                self._take(rank, result)
        self._look_at_processes()
        if time.monotonic() >= self._free_at:
            self._give_up()

    def _give_up(self) -> None:
        """End ranks that could not be freed; those that are not ours are waited for no longer."""
        for rank in list(self._pending):
            if self._processes:
                self._processes.kill(name_of(rank))
            else:
                del self._pending[rank]
                self._lose(rank)

    def _lose(self, rank: int) -> None:
        """Note an engine that does not answer; on this host its process says how it ended."""
        self._gone.add(rank)
        self._fail()
        if self._processes is None:
            silent = _described("LostRankError", "its engine does not answer any more")
            self._outcome.add({"event": "mark", "kind": "error", "rank": rank, **silent})

    def _take(self, rank: int, result: Any) -> None:
        try:
            report = self._reports[rank] = result.get(0)
        except RemoteError as error:
            if error.ename == "EngineError":
                self._lose(rank)
                return
            report = {"error": _described(error.ename, error.evalue)}
        if "error" in report:
            self._outcome.add({"event": "mark", "kind": "error", "rank": rank, **report["error"]})
            self._fail()

    def _look_at_processes(self) -> None:
        if self._processes is None:
            return
        now = time.monotonic()
        ended = list(self._processes.codes)  # the first one may be why the others ended
        last = len(ended)
        for rank in sorted(
            range(self._size),
            key=lambda rank: ended.index(name_of(rank)) if name_of(rank) in ended else last,
        ):
            name = name_of(rank)
            if name in ended:
                if rank not in self._ended:
                    self._ended.add(rank)
                    self._hear_of_an_end(rank, name)
                self._gone.add(rank)
                self._pending.pop(rank, None)
                self._fail()
            elif now - self._processes.frozen.get(name, now) >= SECONDS_FROZEN:
                self._processes.frozen.pop(name, None)
                self._outcome.add(
                    {"event": "rank_stopped", "rank": rank, "seconds": SECONDS_FROZEN}
                )
                self._processes.kill(name)
                self._fail()

    def _hear_of_an_end(self, rank: int, name: str) -> None:
        if name in self._processes.lost:
            lost = _described("LostRankError", self._processes.lost[name])
            self._outcome.add({"event": "mark", "kind": "error", "rank": rank, **lost})
        else:
            code = self._processes.codes[name]
            self._outcome.add({"event": "rank_ended", "rank": rank, "code": code})

    def _hear_horovod(self, rank: int, result: Any) -> None:
        """Look for the stall check's words, which Horovod writes past Python's streams."""
        text = "" if rank in self._gone else _streams(result)
        text += self._log(rank)[self._logs[rank] :]
        for line in text.splitlines(keepends=True):
            self._outcome.add({"event": "line", "rank": rank, "text": line})

    def _log(self, rank: int) -> str:
        return self._processes.log(name_of(rank)) if self._processes else ""


def _described(name: str, text: str) -> dict:
    return {"name": name, "text": text, "line": None, "traceback": []}


def _streams(result: Any) -> str:
    return result.stdout + result.stderr


def _display(rank: int, output: dict) -> None:
    """Show a picture or a table that a rank has displayed."""
    from IPython.display import publish_display_data

    print(f"[{rank}]")
    publish_display_data(output["data"], output.get("metadata", {}))
