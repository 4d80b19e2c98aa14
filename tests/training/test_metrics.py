"""Recorded metrics are read back bit for bit, also after a crash or from a damaged file."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch

from horovod_lm.training import metrics
from horovod_lm.training.metrics import COLUMNS, MetricsRecorder, StepTimer, read_metrics
from horovod_lm.utils.errors import DataError


@pytest.fixture
def open_recorder(tmp_path):
    def recorder(resume_step: int | None = None) -> MetricsRecorder:
        return MetricsRecorder(tmp_path, tmp_path / "logs", tmp_path / "events", 0, resume_step)

    return recorder


def fill(recorder: MetricsRecorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        values = {"loss": 1 / step, "seconds_update": step / 7}
        recorder.record("train", epoch=0, step=step, tokens=step * 10, **values)
        if step % 5 == 0:
            recorder.record("validation", epoch=0, step=step, tokens=step * 10, loss=2 / step)


def test_the_table_has_the_designs_columns(tmp_path, open_recorder):
    recorder = open_recorder()
    recorder.record("train", step=1, loss=2.5, unknown="only in the lines", seconds_data=0.25)
    recorder.close()
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert tuple(header.split(",")) == COLUMNS == (
        "phase", "epoch", "step", "tokens", "learning_rate", "loss", "perplexity", "accuracy",
        "tokens_per_second", "gradient_norm", "seconds_data", "seconds_forward",
        "seconds_backward", "seconds_allreduce", "seconds_update", "world_size", "steps_replayed",
    )  # fmt: skip
    assert row == "train,,1,,,2.5,,,,,0.25,,,,,,"
    assert read_metrics(tmp_path) == [
        {"phase": "train", "step": 1, "loss": 2.5, "seconds_data": 0.25}]  # fmt: skip
    line = json.loads((tmp_path / "logs" / "rank0.jsonl").read_text())
    assert (line["event"], line["rank"], line["unknown"]) == ("metrics", 0, "only in the lines")


def test_numbers_come_back_to_the_bit(tmp_path, open_recorder):
    values = [0.1, 1 / 3, 5e-324, 1.7e308, -0.0, 2.0, math.inf, -math.inf, math.nan]
    recorder = open_recorder()
    for step, value in enumerate(values):
        recorder.record("train", step=step, loss=value)
        assert len(read_metrics(tmp_path)) == step + 1  # on the disk at once
    recorder.close()
    rows = read_metrics(tmp_path)
    assert str([row["step"] for row in rows]) == str([*range(len(values))])
    assert str([row["loss"] for row in rows]) == str(values)


def test_a_resumed_run_drops_the_rows_that_will_come_again(tmp_path, open_recorder):
    recorder = open_recorder()
    fill(recorder, 1, 12)
    recorder.close()
    whole = (tmp_path / "metrics.csv").read_text()
    recorder = open_recorder(resume_step=7)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7]
    fill(recorder, 8, 12)
    recorder.close()
    assert (tmp_path / "metrics.csv").read_text() == whole
    assert not (tmp_path / "metrics.tmp").exists()
    assert [row["step"] for row in read_metrics(tmp_path, "validation")] == [5, 10]
    open_recorder().close()  # a new run
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [(b"0.5,", b"0.\xff5,"), (b"0.5,", b"\0" * 40), (b"0.5,", b""), (b"phase", b"ph\0se")],
)  # fmt: skip
def test_damaged_lines_of_a_table_are_left_out_with_a_warning(
    tmp_path, open_recorder, whole, damaged
):
    recorder = open_recorder()
    fill(recorder, 1, 3)
    recorder.close()
    rows, table = read_metrics(tmp_path), tmp_path / "metrics.csv"
    table.write_bytes(table.read_bytes().replace(whole, damaged, 1) + b"train,0,4,0.")
    if whole == b"phase":
        assert read_metrics(tmp_path) == rows
    else:
        with pytest.warns(UserWarning, match=r"metrics.csv: 1 damaged lines are left out"):
            assert read_metrics(tmp_path) == [rows[0], rows[2]]
    open_recorder(resume_step=3).close()
    assert len(read_metrics(tmp_path)) == (3 if whole == b"phase" else 2)
    table.unlink()
    with pytest.raises(DataError, match=r"metrics.csv cannot be read: No such file"):
        read_metrics(tmp_path)


def test_tensorboard_shows_the_same_numbers_and_is_optional(tmp_path, open_recorder, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recorder = open_recorder()
    fill(recorder, 1, 5)
    recorder.close()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    shutil.rmtree(tmp_path / "events")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    recorder = open_recorder()
    fill(recorder, 1, 2)
    recorder.close()
    assert len(read_metrics(tmp_path)) == 2 and not (tmp_path / "events").exists()


def test_the_timer_books_each_part_of_a_step(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    timer = StepTimer(torch.device("cpu"))  # started at 0
    for _ in range(2):
        with timer.part("forward"):  # 1 to 2, and 3 to 4
            pass
    with timer.part("update"):  # 5 to 6
        pass
    timer.stop()  # at 7
    seconds, parts = timer.wait()
    assert seconds == 7
    assert parts == dict.fromkeys(metrics.PARTS_OF_A_STEP, 0.0) | {
        "seconds_forward": 2, "seconds_update": 1}  # fmt: skip
