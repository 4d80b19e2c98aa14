"""A run's JSON lines, read while they are written."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.jupyter.run_reader import RunReader
from horovod_lm.utils.metrics import MetricsRecorder


def test_every_line_is_read_once_wherever_it_was_cut(tmp_path_factory):
    @given(st.lists(st.integers(1, 60), max_size=30))
    def check(cuts):
        folder = tmp_path_factory.mktemp("logs")
        events = [{"event": "other", "rank": 0, "number": number} for number in range(12)]
        sent = "".join(json.dumps(event) + "\n" for event in events).encode()
        reader, got, at = RunReader(folder), [], 0
        with open(folder / "rank0.jsonl", "ab", buffering=0) as file:
            for cut in [*cuts, len(sent)]:
                file.write(sent[at : at + cut])
                at += cut
                got += reader.update()
        assert got == events

    check()


def test_what_a_recorder_writes_is_how_far_the_run_is(tmp_path):
    reader = RunReader(tmp_path / "logs")
    assert reader.update() == [] and math.isnan(reader.loss)
    recorders = [MetricsRecorder(tmp_path, tmp_path / "logs", tmp_path / "tb", r) for r in (0, 10)]
    for recorder in recorders:
        recorder.event("start", step=4, total_steps=9, pid=1)
        recorder.record("train", epoch=0, step=5, tokens=10, loss=2.5)
        recorder.record("validation", epoch=0, step=5, tokens=10, loss=9.0)
    assert [event["rank"] for event in reader.update()] == [0, 0, 0, 10, 10, 10]
    assert (reader.step, reader.total_steps, reader.loss) == (5, 9, 2.5)
    recorders[0].record("train", epoch=0, step=6, tokens=10, loss=2.25)
    assert len(reader.update()) == 1 and reader.step == 6
    for recorder in recorders:
        recorder.close()


def test_a_resumed_run_s_earlier_lines_are_not_its_own(tmp_path):
    (tmp_path / "rank0.jsonl").write_text('{"event": "start", "rank": 0, "step": 0}\n')
    reader = RunReader(tmp_path)
    reader.skip_what_is_there()
    assert reader.update() == [] and reader.total_steps == 0
