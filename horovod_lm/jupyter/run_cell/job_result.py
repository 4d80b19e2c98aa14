"""The result of a cell or a job: which rank failed first, why, and what became of the others."""

from __future__ import annotations

import pickle
import re
import signal
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.utils.errors import DistributedError, how_it_ended

LAST_LINES = 12  # of a failed command's output, in the error
# Horovod: it raises its exception for a lost rank also where the ranks' calls do not match.
_MISMATCH = re.compile(r"^(Mismatched |No \w+ operation enabled)")
# Horovod: a line of its log begins with the time, the level and the place in its source.
_LOG_PREFIX = re.compile(r"^\[\d{4}-[^\]]*: [A-Z] [^\]]*\] (?:\[\d+\]: )?")
_MISSING = re.compile(r"^(\d+)!?: \[(.+)\]")
_STALL_ENDS = re.compile(r"is stalled for longer than (\d+) seconds\. Will shutdown")
# Lines of Horovod's log that the error at the end of the cell explains better.
_REPEATED_IN_ERROR = re.compile(
    r"(Horovod: )?(Horovod background loop uncaught exception|One or more rank \(marked by)"
)
# Lines of horovodrun that the ranks' own errors explain better.
_NOISE = re.compile(r"^(Terminating remaining workers|Process \d+ exit|horovodrun: process )")


class RankError(DistributedError):
    """A rank failed. The text names it and says why.

    Attributes:
        rank: the rank that failed first; None: no rank was to blame.
        code: its exit code, if it had one; above 128: 128 and the number of a signal.
        trace: its own traceback or its last lines of output; may be empty.
    """

    def __init__(
        self, text: str, rank: int | None = None, code: int | None = None, trace: str = ""
    ) -> None:
        super().__init__(text)
        self.rank, self.code, self.trace = rank, code, trace

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this instead of showing the frames of the magic.
        return [*self.trace.rstrip("\n").splitlines(), f"{type(self).__name__}: {self}"]


class RanksStopped(KeyboardInterrupt):
    """The user interrupted a cell; every rank was ended."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def readable(line: str) -> str:
    """Return a rank's line as it is shown: Horovod's log as "Horovod: ...", or "" to omit it."""
    text = _LOG_PREFIX.sub("Horovod: ", line)
    return "" if _REPEATED_IN_ERROR.match(text) else text


class StallReports:
    """Recognises the reports of Horovod's stall check in the output of one rank.

    A report is a line "One or more tensors ...", a line "Missing ranks:", and a line for each
    missing rank. Elsewhere, lines like the last two are the program's own.
    """

    def __init__(self) -> None:
        self._inside = False

    def includes(self, line: str) -> bool:
        """Return whether the next line, as `readable` returns it, belongs to a report."""
        begins = line.startswith("Horovod: One or more tensors")
        goes_on = line.startswith("Missing ranks:") or _MISSING.match(line) is not None
        self._inside = begins or (self._inside and goes_on)
        return self._inside


@dataclass
class JobResult:
    """What is known about the ranks of a cell or a job; each dictionary's keys are ranks."""

    size: int  # the number of ranks
    what: str = "the cell"  # what they run, for error messages
    elastic: bool = False  # whether the job continues when ranks fail; then only its end counts
    processes: dict[int, int] = field(default_factory=dict)  # ids, of ranks on this host
    printed: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    values: dict[int, bytes] = field(default_factory=dict)  # the last values, pickled
    errors: dict[int, dict[str, Any]] = field(default_factory=dict)  # see `rank_cell.describe`
    code: int | None = None  # of horovodrun; None while it runs
    was_stopped: bool = False  # whether the user has ended the ranks
    _launcher_output: str = ""
    _codes: dict[int, int] = field(default_factory=dict)
    _own_codes: dict[int, int] = field(default_factory=dict)
    _frozen: dict[int, float] = field(default_factory=dict)

    def add(self, event: dict[str, Any]) -> None:
        """Record an event of `processes` or of `framed_horovodrun`."""
        kind: str = event["event"]
        rank: Any = event.get("rank")
        if kind == "output" and rank is None:
            self._launcher_output += event["text"]
        elif kind == "output":
            self.printed[rank].append(event["text"])
        elif kind == "rank_started":
            self.processes[rank] = event["pid"]
        elif kind == "rank_ended":
            self._codes.setdefault(rank, event["code"])
        elif kind == "frozen":
            self._frozen[rank] = event["seconds"]
        elif kind == "ended":
            self.code, self.was_stopped = event["code"], event["stopped"]
            self._launcher_output += event["text"]

    def take(self, rank: int, report: dict[str, Any]) -> None:
        """Record what a rank has sent: a "value", an "error" or its own "exit" code."""
        if "value" in report:
            self.values[rank] = report["value"]
        elif "error" in report:
            self.errors[rank] = report["error"]
        elif report["exit"]:
            self._own_codes[rank] = report["exit"]

    def error(self) -> RankError | RanksStopped | None:
        """Return the error that the job ended with, or None if it succeeded."""
        if self.was_stopped:
            return RanksStopped(f"stopped by you: every rank of {self.what} was ended")
        failed = self.errors or self._codes or self._own_codes
        if self.code == 0 and (self.elastic or not failed):
            return None
        return (  # the most certain cause
            self._own_error()
            or self._frozen_rank()
            or self._stalled_ranks()
            or self._ended_first()
            or self._without_a_cause()
        )

    def load_values(self) -> list[Any]:
        """Return each rank's last value, in the order of ranks; None where there is none.

        Raises:
            RankError: the notebook cannot make an object of it.
        """
        loaded = []
        for rank in range(self.size):
            try:
                loaded.append(pickle.loads(self.values[rank]) if rank in self.values else None)
            except Exception as error:
                raise RankError(
                    f"the last value of rank {rank} cannot be loaded in the notebook"
                    f" ({type(error).__name__}: {error}): end the cell with numbers, tensors or"
                    " plain containers of them"
                ) from None
        return loaded

    def text(self, rank: int) -> str:
        """Return what a rank has printed so far."""
        return "".join(self.printed.get(rank, []))

    def _own_error(self) -> RankError | None:
        own = {
            rank: error
            for rank, error in self.errors.items()
            if error["name"] != rank_cell.LOST or _MISMATCH.match(error["text"])
        }
        if not own:
            return None
        rank, error = min(own.items())
        keys = ("name", "text", "line")
        same = [n for n, one in sorted(own.items()) if all(one[k] == error[k] for k in keys)]
        where = f" (line {error['line']} of the cell)" if error["line"] else ""
        text = f"{error['name']}: {error['text']}" if error["text"] else error["name"]
        name = "every rank" if len(same) == self.size > 1 else rank_list(same)
        others = "" if len(same) == self.size else self._others(*same)
        return RankError(f"{name}: {text}{where}{others}", rank, 1, "".join(error["traceback"]))

    def _frozen_rank(self) -> RankError | None:
        if not self._frozen:
            return None
        rank, seconds = min(self._frozen.items())
        text = f"rank {rank} was stopped (SIGSTOP), not woken for {seconds:g} s, and killed"
        return RankError(text + self._others(rank), rank, 128 + signal.SIGKILL)

    def _stalled_ranks(self) -> RankError | None:
        tensors, seconds = self._reported_stalls()
        if not seconds or not tensors:
            return None
        missing = sorted(tensors.items())
        waiting = [other for other in range(self.size) if other not in tensors]
        rule = "every rank must make the same collective calls in the same order"
        if not waiting:  # each waited in a call of its own
            each = ", ".join(f"rank {rank} did not come to {tensor!r}" for rank, tensor in missing)
            return RankError(f"the ranks waited for each other for {seconds} s: {each}; {rule}")
        rank, tensor = missing[0]
        text = (
            f"{rank_list(sorted(tensors))} did not come to {tensor!r}, where"
            f" {rank_list(waiting)} waited for {seconds} s: {rule}"
        )
        return RankError(text, rank)

    def _reported_stalls(self) -> tuple[dict[int, str], int]:
        """Return the tensor that each missing rank did not come to, and the limit in seconds."""
        tensors, seconds = {}, 0
        for lines in self.printed.values():
            reports = StallReports()
            for line in lines:
                text = readable(line)
                missing = _MISSING.match(text.strip())
                if reports.includes(text) and missing:
                    name = missing[2].split(", ")[0]
                    tensors[int(missing[1])] = name.partition(".")[2] or name
                elif ends := _STALL_ENDS.search(line):
                    seconds = int(ends[1])
        return tensors, seconds

    def _ended_first(self) -> RankError | None:
        # The others are ended by SIGTERM, so the first one that ended is the cause; before it come
        # those that chose their exit code, because another rank may have been faster.
        codes = {**self._own_codes, **self._codes, **self._own_codes}
        codes = {rank: code for rank, code in codes.items() if rank not in self.errors}
        if self.errors:  # not a rank that was ended while it was exiting
            codes = {rank: code for rank, code in codes.items() if code != 128 + signal.SIGTERM}
        if not codes:
            return None
        rank, code = next(iter(codes.items()))
        trace = "".join(self.text(rank).splitlines(keepends=True)[-LAST_LINES:])
        return RankError(f"rank {rank} {how_it_ended(code)}{self._others(rank)}", rank, code, trace)

    def _without_a_cause(self) -> RankError:
        if self.errors:
            rank, error = min(self.errors.items())
            gone = [other for other in range(self.size) if other not in self.errors]
            line = f" at line {error['line']} of the cell" if error["line"] else ""
            # They exited with code 0 too early, which Horovod reports as a shutdown.
            left = f", because {rank_list(gone)} had already come to the end" if gone else ""
            return RankError(f"rank {rank} lost the others{line}{left}", rank, 1)
        lines = [line.strip() for line in self._launcher_output.splitlines()]
        useful = [line for line in lines if line and not _NOISE.match(line)]
        last = useful[-1] if useful else f"it ended with exit code {self.code}"
        last = last.removeprefix("horovodrun: ")
        return RankError(f"horovodrun could not run {self.what}: {last}")

    def _others(self, *failed: int) -> str:
        others = [rank for rank in range(self.size) if rank not in failed]
        if not others:
            return ""
        return f"; {rank_list(others)} {'was' if len(others) == 1 else 'were'} ended with it"


def rank_list(numbers: list[int]) -> str:
    """Return "rank 1", or "ranks 0, 2 and 3"."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    *first, last = map(str, numbers)
    return f"ranks {', '.join(first)} and {last}"
