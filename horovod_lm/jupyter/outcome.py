"""What became of a job's ranks, in words: which one failed first, why, and how the others ended."""

from __future__ import annotations

import re
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from horovod_lm.utils.errors import DistributedError

LAST_LINES = 12  # of a failed command's output, in the error
_LOST = "HorovodInternalError"  # Horovod: raised on the ranks that survive another one
# Horovod: the same exception when the ranks are all there and their calls do not fit together.
_DISAGREEMENT = re.compile(r"^(Mismatched |No \w+ operation enabled)")
# Horovod: its stall check reports in three lines, and again at each look that it takes.
_STALLED = ("Horovod: One or more tensors", "Missing ranks:", "One or more rank")
_MISSING = re.compile(r"^(\d+)!?: \[(.+)\]")
_STALL_ENDS = re.compile(r"is stalled for longer than (\d+) seconds\. Will shutdown")
# What horovodrun says about an end that the ranks' own words explain better.
_NOISE = re.compile(r"^(Terminating remaining workers|horovodrun: process )")


class RankError(DistributedError):
    """A rank failed. The text names it and says why.

    Attributes:
        rank: the rank that failed first, or None where no rank was to blame.
        code: its exit code, where it had one; above 128, 128 and the number of a signal.
        trace: its own traceback, or its last lines; may be empty.
    """

    def __init__(
        self, text: str, rank: int | None = None, code: int | None = None, trace: str = ""
    ) -> None:
        super().__init__(text)
        self.rank, self.code, self.trace = rank, code, trace

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this instead of showing how the magic works inside.
        return [*self.trace.rstrip("\n").splitlines(), f"{type(self).__name__}: {self}"]


class RanksStopped(KeyboardInterrupt):
    """The reader interrupted a cell; every rank was ended."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@dataclass
class Outcome:
    """Everything that was heard of a job's ranks.

    Attributes:
        size: how many ranks there are.
        what: what they run, for sentences: "the cell", or a command's name.
        timeout: seconds that it was given; 0: no limit.
        elastic: whether ranks may fail while the job goes on; then only its end counts.
        launcher: horovodrun's process id.
        processes: process ids of the ranks on this host, by rank.
        printed: each rank's output, by rank.
        values: each rank's last value, packed.
        code: horovodrun's exit code; None while it runs.
        reason: why it was ended: "", "stopped", "timeout", "kernel", "failed".
        left: ids of processes that could not be ended; empty, or something is badly wrong.
    """

    size: int
    what: str = "the cell"
    timeout: float = 0.0
    elastic: bool = False
    launcher: int | None = None
    processes: dict[int, int] = field(default_factory=dict)
    printed: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    values: dict[int, str] = field(default_factory=dict)
    code: int | None = None
    reason: str = ""
    left: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    _codes: dict[int, int] = field(default_factory=dict)
    _errors: dict[int, dict] = field(default_factory=dict)
    _frozen: dict[int, float] = field(default_factory=dict)
    _places: dict[int, dict] = field(default_factory=dict)
    _missing: dict[int, str] = field(default_factory=dict)
    _stalled: int = 0

    def add(self, event: dict) -> None:
        """Take in one event of the supervisor."""
        kind, rank = event["event"], event.get("rank")
        if kind == "line":
            self.printed[rank].append(event["text"])
            self._look_for_a_stall(event["text"])
        elif kind == "mark":
            stores = {"value": self.values, "error": self._errors, "where": self._places}
            stores[event["kind"]][rank] = event["packed"] if event["kind"] == "value" else event
        elif kind == "started":
            self.launcher = event["pid"]
        elif kind == "rank":
            self.processes[rank] = event["pid"]
        elif kind == "rank_ended":
            self._codes.setdefault(rank, event["code"])
        elif kind == "rank_stopped":
            self._frozen[rank] = event["seconds"]
        elif kind == "said":
            self.said.append(event["text"])
        elif kind == "ended":
            self.code, self.reason, self.left = event["code"], event["reason"], event["left"]

    def error(self) -> RankError | RanksStopped | None:
        """Return the error that the job ended with, or None where all is well."""
        if self.reason == "stopped":
            return RanksStopped(f"stopped by you: every rank of {self.what} was ended")
        if self.reason == "timeout":
            return RankError(self._too_long())
        if self.code == 0 and (self.elastic or not (self._errors or self._codes)):
            return None
        return (
            self._own_error()
            or self._frozen_rank()
            or self._stalled_ranks()
            or self._ended_first()
            or self._without_a_cause()
        )

    def text(self, rank: int) -> str:
        """Return what a rank has printed so far."""
        return "".join(self.printed[rank])

    # ---- causes, the surest first ---------------------------------------------------------------

    def _own_error(self) -> RankError | None:
        own = {
            rank: error
            for rank, error in self._errors.items()
            if error["name"] != _LOST or _DISAGREEMENT.match(error["text"])
        }
        if not own:
            return None
        rank, error = min(own.items())
        alike = ("name", "text", "line")
        same = [
            other
            for other, one in sorted(own.items())
            if all(one[key] == error[key] for key in alike)
        ]
        where = f" (line {error['line']} of the cell)" if error["line"] else ""
        text = f"{error['name']}: {error['text']}" if error["text"] else error["name"]
        name = "every rank" if len(same) == self.size > 1 else ranks(same)
        others = "" if len(same) == self.size else self._others(*same)
        return RankError(f"{name}: {text}{where}{others}", rank, 1, "".join(error["traceback"]))

    def _frozen_rank(self) -> RankError | None:
        if not self._frozen:
            return None
        rank, seconds = min(self._frozen.items())
        text = f"rank {rank} was stopped (SIGSTOP), not woken for {seconds:g} s, and killed"
        return RankError(text + self._others(rank), rank, 128 + signal.SIGKILL)

    def _stalled_ranks(self) -> RankError | None:
        if not self._stalled or not self._missing:
            return None
        rank, tensor = min(self._missing.items())
        waiting = [other for other in range(self.size) if other not in self._missing]
        text = (
            f"{ranks(sorted(self._missing))} did not come to {tensor!r}, where"
            f" {ranks(waiting)} waited for {self._stalled} s: every rank must make the same"
            " collective calls in the same order"
        )
        return RankError(text, rank)

    def _ended_first(self) -> RankError | None:
        # horovodrun's own SIGTERM is how the others end; the first one that it names is the cause.
        codes = {rank: code for rank, code in self._codes.items() if rank not in self._errors}
        if self._errors:  # a rank that was only about to end, and was ended because of the others
            codes = {rank: code for rank, code in codes.items() if code != 128 + signal.SIGTERM}
        if not codes:
            return None
        rank, code = next(iter(codes.items()))
        trace = "".join(self.text(rank).splitlines(keepends=True)[-LAST_LINES:])
        return RankError(f"rank {rank} {how(code)}{self._others(rank)}", rank, code, trace)

    def _without_a_cause(self) -> RankError:
        if self._errors:
            rank, error = min(self._errors.items())
            gone = [other for other in range(self.size) if other not in self._errors]
            line = f" at line {error['line']} of the cell" if error["line"] else ""
            # They ended well, and too early: Horovod calls that a shutdown.
            left = f", because {ranks(gone)} had already come to the end" if gone else ""
            return RankError(f"rank {rank} lost the others{line}{left}", rank, 1)
        words = [line.strip() for line in self.said if line.strip() and not _NOISE.match(line)]
        last = words[-1] if words else f"it ended with exit code {self.code}"
        last = last.removeprefix("horovodrun: ")
        return RankError(f"horovodrun could not run {self.what}: {last}", trace="")

    def _too_long(self) -> str:
        at = [
            f"rank {rank} was at line {place['line']}: {place['code']}"
            for rank, place in sorted(self._places.items())
        ]
        text = f"{self.what} took longer than {self.timeout:g} s, so its ranks were ended"
        return "; ".join([text, *at])

    def _others(self, *failed: int) -> str:
        others = [rank for rank in range(self.size) if rank not in failed]
        if not others:
            return ""
        return f"; {ranks(others)} {'was' if len(others) == 1 else 'were'} ended with it"

    def _look_for_a_stall(self, text: str) -> None:
        missing = _MISSING.match(text.strip())
        if missing:
            name = missing[2].split(", ")[0]
            self._missing[int(missing[1])] = name.partition(".")[2] or name
        ends = _STALL_ENDS.search(text)
        if ends:
            self._stalled = int(ends[1])


def is_of_a_stall(line: str) -> bool:
    """Say whether a line, as it is shown, is one of the stall check's."""
    return line.startswith(_STALLED) or _MISSING.match(line) is not None


def without_stalls(lines: Iterable[str]) -> Iterator[str]:
    """Leave out what the stall check reports: its sentences, and the ranks listed right below."""
    reporting = False
    for line in lines:
        reporting = line.startswith(_STALLED) or (reporting and is_of_a_stall(line))
        if not reporting:
            yield line


def ranks(numbers: list[int]) -> str:
    """Return "rank 1", or "ranks 0, 2 and 3"."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    *first, last = map(str, numbers)
    return f"ranks {', '.join(first)} and {last}"


def how(code: int) -> str:
    """Return how a process ended, from its exit code as a shell gives it."""
    if code <= 128 or code - 128 not in {number.value for number in signal.Signals}:
        return f"ended with exit code {code}"
    name = signal.Signals(code - 128).name
    why = {
        "SIGKILL": "by somebody, or by the system when memory ran out",
        "SIGSEGV": "a crash in compiled code",
        "SIGABRT": "compiled code gave up",
    }.get(name, "")
    return f"was killed by {name}, exit code {code}" + (f" ({why})" if why else "")
