"""Horovod's timeline, read: which tensor was in which phase, from when to when.

    spans = read_timeline("timeline.json")        # recorded with horovodrun --timeline-filename
    for phase, seconds in seconds_by_phase(reduction(spans, 3)).items(): ...

Horovod writes the events of rank 0 in the format of Chrome's trace viewer (chrome://tracing or
https://ui.perfetto.dev open it), as they happen: a job that was killed leaves a file that is no
valid JSON, and is just the one that somebody wants to read. An orderly end, too, can lose the last
events: it does not wait for the thread that writes them. What each phase is:
https://horovod.readthedocs.io/en/stable/timeline_include.html
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_lm.utils.errors import DataError

REDUCTION = "ALLREDUCE"  # the phase around all others of a reduction but the negotiation
NEGOTIATION = "NEGOTIATE_"  # how phases begin in which a tensor waits until every rank has it
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Span:
    """One tensor in one phase.

    Attributes:
        tensor: its name, behind that of the call: `allreduce.blocks.0.attention.out_proj.weight`.
        phase: NEGOTIATE_ALLREDUCE, ALLREDUCE, MEMCPY_IN_FUSION_BUFFER, GLOO_ALLREDUCE, ...
        start: seconds since the timeline was opened.
        end: likewise.
    """

    tensor: str
    phase: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


def read_timeline(path: str | Path) -> list[Span]:
    """Return every span of a timeline, in the order in which they begin.

    A file that was cut short gives what had ended before the cut. The marks of single ranks inside
    a negotiation, which have no length, are left out.

    Raises:
        DataError: there is no such file, or it does not begin as a timeline does.
    """
    names: dict[int, str] = {}
    open_phases: dict[int, list[tuple[str, float]]] = defaultdict(list)
    spans = []
    for event in _events(_text(Path(path))):
        # Horovod: each tensor is a process of the trace, and its phases nest like calls.
        tensor, kind = event.get("pid"), event.get("ph")
        if kind == "M" and event["name"] == "process_name":
            names[tensor] = event["args"].get("name", "")
        elif kind == "B":
            open_phases[tensor].append((event["name"], event["ts"]))
        elif kind == "E" and open_phases[tensor]:
            phase, began = open_phases[tensor].pop()
            times = began * MICROSECOND, event["ts"] * MICROSECOND
            spans.append(Span(names.get(tensor, ""), phase, *times))
    # Of two that begin together, the outer one first.
    return sorted(spans, key=lambda span: (span.start, -span.end))


def reduction(spans: Iterable[Span], number: int) -> list[Span]:
    """Return the spans of each tensor's reduction of that number, the first one being 0.

    In training, where every gradient is reduced once in a step, that is a step.
    """
    by_tensor: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_tensor[span.tensor].append(span)
    chosen = []
    for of_tensor in by_tensor.values():
        # From the end of the last reduction to the end of this one: the negotiation comes before.
        ends = sorted(span.end for span in of_tensor if span.phase == REDUCTION)
        chosen += [span for span in of_tensor if bisect_left(ends, span.end) == number < len(ends)]
    return sorted(chosen, key=lambda span: (span.start, -span.end))


def busy_seconds(spans: Iterable[Span]) -> float:
    """Return the time in which at least one of the spans was under way: overlaps count once."""
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return busy


def seconds_by_phase(spans: Iterable[Span]) -> dict[str, float]:
    """Return for each phase the time in which any tensor was in it, the longest first."""
    by_phase: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_phase[span.phase].append(span)
    seconds = {phase: busy_seconds(of_phase) for phase, of_phase in by_phase.items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"the timeline {path} cannot be read ({error.strerror}): record one with"
            " horovodrun --timeline-filename, on the host of rank 0"
        ) from None
    if not text.lstrip().startswith("["):
        raise DataError(
            f"{path} is no timeline of Horovod: it begins with {text[:20]!r} instead of ["
        )
    return text


def _events(text: str) -> Iterator[dict[str, Any]]:
    """Yield one event after another, up to the end or to the first one that is not whole."""
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while True:
        while place < len(text) and text[place] in ", \n\r\t":
            place += 1
        try:
            event, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:  # the closing bracket, or the cut
            return
        yield event
