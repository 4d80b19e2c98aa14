"""Horovod's timeline, complete and truncated. tests/horovod reads the timeline of a real job."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from horovod_lm.analysis.timeline import (
    NEGOTIATION,
    REDUCTION,
    Span,
    busy_seconds,
    read_timeline,
    reduction,
)
from horovod_lm.utils.errors import DataError

# Two tensors that share one message, in the format that Horovod writes, line ends included.
WHOLE = """[
{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros":17}},
{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "allreduce.weight"}},
{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}},
{"ph": "E", "ts": 5, "pid": 1},
{"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": 10, "pid": 1},\
{"ph": "X", "name": "0", "ts": 10, "pid": 1, "dur": 0},{"ph": "E", "ts": 40, "pid": 1},\
{"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "allreduce.bias"}},
{"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": 30, "pid": 2},{"ph": "E", "ts": 40, "pid": 2},\
{"ph": "B", "name": "ALLREDUCE", "ts": 50, "pid": 1},{"ph": "B", "name": "ALLREDUCE", "ts": 50, \
"pid": 2},{"ph": "B", "name": "GLOO_ALLREDUCE", "ts": 55, "pid": 1},\
{"ph": "B", "name": "GLOO_ALLREDUCE", "ts": 56, "pid": 2},{"ph": "E", "ts": 90, "pid": 1},\
{"ph": "E", "ts": 90, "pid": 2},{"ph": "E", "ts": 95, "pid": 1, "args": {"shape": "[3, 4]"}},\
{"ph": "E", "ts": 99, "pid": 2, "args": {"dtype": "float32", "shape": "[3]"}}]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "timeline.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_phase_has_its_tensor_start_and_end(tmp_path):
    spans = read_timeline(write(tmp_path, WHOLE))
    assert [
        (one.tensor, one.phase, round(1e6 * one.start), round(1e6 * one.end)) for one in spans
    ] == [
        ("allreduce.weight", "NEGOTIATE_ALLREDUCE", 10, 40),
        ("allreduce.bias", "NEGOTIATE_ALLREDUCE", 30, 40),
        ("allreduce.bias", "ALLREDUCE", 50, 99),
        ("allreduce.weight", "ALLREDUCE", 50, 95),
        ("allreduce.weight", "GLOO_ALLREDUCE", 55, 90),
        ("allreduce.bias", "GLOO_ALLREDUCE", 56, 90),
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, len(WHOLE)))
def test_a_truncated_file_gives_the_spans_that_had_ended(tmp_path, length):
    whole = set(read_timeline(write(tmp_path, WHOLE)))
    cut = set(read_timeline(write(tmp_path, WHOLE[:length])))
    assert cut <= whole
    assert len(cut) >= WHOLE[:length].count('"E"') - 2  # less one without a start, one cut in two


def test_a_file_that_is_not_a_timeline_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="--timeline-filename"):
        read_timeline(tmp_path / "missing.json")
    with pytest.raises(DataError, match="not a Horovod timeline"):
        read_timeline(write(tmp_path, "step,loss\n1,2\n"))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20))))
def test_busy_seconds_count_overlaps_once(times):
    spans = [Span("tensor", "phase", start, start + length) for start, length in times]
    seconds = {second for start, length in times for second in range(start, start + length)}
    assert busy_seconds(spans) == len(seconds)


def test_a_reduction_is_a_negotiation_and_what_follows_it():
    def spans_at(start: float) -> list[Span]:
        return [
            Span("a", f"{NEGOTIATION}ALLREDUCE", start, start + 2),
            Span("a", REDUCTION, start + 3, start + 8),
            Span("a", "GLOO_ALLREDUCE", start + 4, start + 7),
        ]

    cut_off = [Span("a", f"{NEGOTIATION}ALLREDUCE", 30, 31)]
    both = spans_at(0) + spans_at(10) + cut_off
    assert reduction(both, 0) == spans_at(0) and reduction(both, 1) == spans_at(10)
    assert reduction(both, 2) == []
