"""Read Horovod's timeline: which tensor was in which phase, and when.

    spans = read_timeline("timeline.json")        # recorded with horovodrun --timeline-filename
    busy_seconds(span for span in reduction(spans, 3) if span.phase == "GLOO_ALLREDUCE")

Horovod writes the events of rank 0 in the format of Chrome's trace viewer (chrome://tracing or
https://ui.perfetto.dev). A killed job leaves truncated JSON. Horovod as released also loses the
last events of a normal end; the patch 23-timeline-end writes them. The phases are described in
https://horovod.readthedocs.io/en/stable/timeline_include.html
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_lm.utils.errors import DataError

REDUCTION = "ALLREDUCE"  # the phase that contains all others of a reduction except negotiation
NEGOTIATION = "NEGOTIATE_"  # prefix of the phases in which a tensor waits for all ranks
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Span:
    """One tensor in one phase."""

    tensor: str  # its name with a prefix: `allreduce.blocks.0.attention.out_proj.weight`
    phase: str  # NEGOTIATE_ALLREDUCE, ALLREDUCE, MEMCPY_IN_FUSION_BUFFER, GLOO_ALLREDUCE, ...
    start: float  # seconds since the start of the timeline
    end: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end - self.start


def read_timeline(path: str | Path) -> list[Span]:
    """Return every span of a timeline, ordered by start.

    Of a truncated file, the spans that ended before the truncation. The instantaneous marks of
    single ranks inside a negotiation are left out.

    Raises:
        DataError: the file does not exist or is not a timeline.
    """
    names: dict[int, str] = {}
    open_phases: dict[int, list[tuple[str, float]]] = defaultdict(list)
    spans = []
    for event in _events(Path(path)):
        # Horovod: each tensor is a process of the trace, and its phases nest like calls.
        tensor, kind = event.get("pid", -1), event.get("ph")
        if kind == "M" and event["name"] == "process_name":
            names[tensor] = event["args"].get("name", "")
        elif kind == "B":
            open_phases[tensor].append((event["name"], event["ts"]))
        elif kind == "E" and open_phases[tensor]:
            phase, start = open_phases[tensor].pop()
            times = start * MICROSECOND, event["ts"] * MICROSECOND
            spans.append(Span(names.get(tensor, ""), phase, *times))
    return sorted(spans, key=_outer_first)


def reduction(spans: Iterable[Span], number: int) -> list[Span]:
    """Return the spans of each tensor's reduction with this number, counted from 0.

    In training every gradient is reduced once per step, so this is a step.
    """
    by_tensor: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_tensor[span.tensor].append(span)
    chosen = []
    for of_tensor in by_tensor.values():
        # From the end of the previous reduction, because the negotiation precedes the reduction.
        ends = sorted(span.end for span in of_tensor if span.phase == REDUCTION)
        chosen += [span for span in of_tensor if bisect_left(ends, span.end) == number < len(ends)]
    return sorted(chosen, key=_outer_first)


def busy_seconds(spans: Iterable[Span]) -> float:
    """Return the time covered by at least one span."""
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return busy


def _outer_first(span: Span) -> tuple[float, float]:
    return span.start, -span.end


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file; of a truncated one, those before the last complete `},`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"the timeline {path} cannot be read ({error.strerror}): record one with"
            " horovodrun --timeline-filename, on the host of rank 0"
        ) from None
    if not text.lstrip().startswith("["):
        raise DataError(f"{path} is not a Horovod timeline: it starts with {text[:20]!r}, not [")
    for complete in (text, text[: text.rfind("},") + 1] + "]", "[]"):
        with suppress(json.JSONDecodeError):
            return json.loads(complete)
    return []
