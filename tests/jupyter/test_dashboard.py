"""The training dashboard without a browser: what it shows of real runs, and its Stop button."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from horovod_lm.jupyter.launch import launch
from horovod_lm.jupyter.widgets.dashboard import Dashboard
from horovod_lm.jupyter.widgets.dashboard_view import RunView, entropy_per_token
from horovod_lm.training.metrics import MetricsRecorder, read_metrics
from horovod_lm.utils.errors import ConfigError
from tests.jupyter.conftest import needs_horovod, wait_until

CONFIG = "configs/tiny.yaml"
LONG = {"training": {"max_steps": 100_000, "num_epochs": 100_000, "eval_interval": 1000}}


@pytest.fixture(autouse=True)
def in_project(tiny_project, monkeypatch):
    monkeypatch.chdir(tiny_project)


def test_a_past_run_is_shown_with_the_numbers_of_its_metrics_file_and_cannot_be_stopped(past_run):
    dashboard = Dashboard(past_run)
    assert dashboard.headline.value.startswith("step 20 of 20 &emsp; loss ")
    assert "left" not in dashboard.headline.value
    assert (dashboard.bar.value, dashboard.bar.max, dashboard.bar.bar_style) == (20, 20, "success")
    assert dashboard.stop.disabled
    assert "this run has ended after its last step, 20" in dashboard.message.value
    assert "<td>ended</td>" in dashboard.ranks.value
    width, height = Image.open(io.BytesIO(bytes(dashboard.picture.value))).size
    assert width > 900 and height > 250
    rows = read_metrics(past_run)
    assert [row["step"] for row in dashboard.view.rows] == [row["step"] for row in rows]
    for ours, stored in zip(dashboard.view.rows, rows, strict=True):
        assert ours["loss"] == pytest.approx(stored["loss"], rel=1e-12)
    last = [row["loss"] for row in rows if row["phase"] == "train"][-1]
    assert f"perplexity {math.exp(last):,.2f}" in dashboard.view.headline()


def test_the_entropy_is_the_exact_entropy_shared_among_a_story_s_tokens(past_run, tiny_project):
    stories = json.loads((tiny_project / "data" / "metadata.json").read_text())["stories"]
    expected = stories["entropy_nats_per_story"] / stories["tokens_per_story"]
    view = RunView(past_run)
    view.update()
    assert view.entropy == entropy_per_token(past_run) == pytest.approx(expected)
    assert entropy_per_token(tiny_project / "configs") is None


def test_every_line_is_read_once_wherever_it_was_cut(tmp_path_factory):
    @given(st.lists(st.integers(1, 60), max_size=30))
    def check(cuts):
        folder = tmp_path_factory.mktemp("logs")
        events = [{"event": "other", "rank": 0, "time": number} for number in range(12)]
        sent = "".join(json.dumps(event) + "\n" for event in events).encode()
        view, got, at = RunView(folder, log_dir=folder), [], 0
        with open(folder / "rank0.jsonl", "ab", buffering=0) as file:
            for cut in [*cuts, len(sent)]:
                file.write(sent[at : at + cut])
                at += cut
                got += view.update()
        assert got == events

    check()


@pytest.mark.parametrize(
    "damaged",
    [b'{"event": "metrics", "ti', b"\xff\0\n", b"[7]\n", b"[" * 10_000 + b"\n", b'{"rank": "x"}\n',
     b'{"event": "metrics", "rank": 0, "time": 0, "phase": "train", "step": 2, "loss": "low"}\n'],
)  # fmt: skip
def test_damaged_lines_are_left_out_and_said(past_run, tmp_path, damaged):
    folder = copy_of(past_run, tmp_path)
    log = folder / "logs" / "rank0.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:4], damaged, *lines[4:]]))
    dashboard = Dashboard(folder)
    assert dashboard.bar.value == 20 and len(dashboard.view.rows) == len(lines) - 2
    assert "parts of rank0.jsonl could not be read" in dashboard.ranks.value
    log.write_bytes(lines[0])  # another run has taken the name
    dashboard.update()
    assert dashboard.view.rows == []
    (folder / "logs" / "rank1.jsonl").mkdir()
    dashboard.update()
    assert "parts of rank0.jsonl, rank1.jsonl could" in dashboard.ranks.value
    shutil.rmtree(folder / "logs")  # while it is watched
    (folder / "run.json").write_text('{"sessions": [5]}')
    dashboard.update()
    assert "whether this run trains is unknown" in dashboard.message.value


def test_what_a_recorder_writes_is_read_and_a_step_that_is_repeated_is_shown_once(tmp_path):
    def record(rank: int, start: int, losses: list[float]) -> None:
        recorder = MetricsRecorder(tmp_path, tmp_path / "logs", tmp_path / "tb", rank)
        recorder.event("start", step=start, total_steps=9, pid=1)
        for step, loss in enumerate(losses, start + 1):
            recorder.record("train", epoch=0, step=step, tokens=10, loss=loss)
        recorder.record("validation", epoch=0, step=start + len(losses), tokens=10, loss=9.0)
        recorder.close()

    view = RunView(tmp_path)
    assert view.update() == [] and math.isnan(view.loss)
    record(0, 4, [2.5])
    record(10, 4, [2.5])
    assert [event["rank"] for event in view.update()] == [0, 0, 0, 10, 10, 10]
    assert (view.step, view.total_steps, view.loss) == (5, 9, 2.5)
    later = RunView(tmp_path, skip_existing=True)  # a resumed run
    assert later.update() == [] and later.total_steps == 0
    record(0, 4, [2.4, 2.3])  # from the checkpoint of step 4
    view.update()
    train = [(row["step"], row["loss"]) for row in view.rows if row["phase"] == "train"]
    assert train == [(5, 2.4), (6, 2.3)]


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="is not a run: it holds no config.yaml"):
        Dashboard(tmp_path)


def copy_of(run: Path, folder: Path, lines: int | None = None) -> Path:
    """Copy a run, with its first lines only; None: with all."""
    copy = folder / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    log = copy / "logs" / "rank0.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:lines]))
    return copy


def test_how_far_a_run_came_is_said_unless_it_is_of_another_machine(past_run, tmp_path):
    folder = copy_of(past_run, tmp_path, lines=8).rename(tmp_path / "$_{$")  # no mathematics
    dashboard = Dashboard(folder)
    assert "this run has ended at step 7 of 20, before its last one" in dashboard.message.value
    assert dashboard.bar.bar_style == "warning"
    record = json.loads((folder / "run.json").read_text())
    record["sessions"][-1]["host"] = "somewhere-else"
    (folder / "run.json").write_text(json.dumps(record))
    dashboard.update()
    assert "the ranks are on somewhere-else" in dashboard.message.value
    with pytest.raises(ConfigError, match="no rank of .* runs on this host: nothing to stop"):
        dashboard.view.ask_to_stop()


def test_a_run_that_has_only_just_been_described_is_waited_for(past_run, tmp_path):
    folder = copy_of(past_run, tmp_path, lines=0)
    (folder / "run.json").touch()

    async def watch() -> None:
        dashboard = Dashboard(folder)
        assert dashboard.is_busy and dashboard.headline.value == "waiting for the first step"
        dashboard.stop.click()
        assert "nothing to stop" in dashboard.message.value and not dashboard.stop.disabled
        shutil.copytree(past_run / "logs", folder / "logs", dirs_exist_ok=True)
        hour_ago = time.time() - 3600
        os.utime(folder / "run.json", (hour_ago, hour_ago))
        await seen(lambda: "this run has ended" in dashboard.message.value, 10)
        assert dashboard.bar.value == 20

    asyncio.run(watch())


def test_an_error_inside_is_shown_and_not_lost(past_run, monkeypatch):
    def fail() -> bool:
        raise RuntimeError("the disk is <gone>")

    async def watch() -> None:
        monkeypatch.setattr(Dashboard, "is_live", True)
        dashboard = Dashboard(past_run)
        monkeypatch.setattr(dashboard.view, "update", fail)
        error = "<b role='alert'>RuntimeError: the disk is &lt;gone&gt;</b>"
        await seen(lambda: dashboard.message.value == error, 10)
        assert dashboard.is_busy  # the next look may succeed
        dashboard.close()

    asyncio.run(watch())


# ---- live runs -----------------------------------------------------------------------------------


async def seen(condition, seconds: float = 60) -> None:
    """Let the event loop work until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.1)


@pytest.mark.horovod
@needs_horovod
@pytest.mark.usefixtures("nothing_left")
class TestLive:
    def test_a_closed_one_stops_watching_and_another_names_a_rank_that_dies(self):
        async def watch() -> None:
            job = launch(CONFIG, 2, overrides=LONG, run_name="watched")
            before = len(asyncio.all_tasks())
            closed = job.dashboard()
            await seen(lambda: closed.bar.value > 0)
            closed.close()
            await asyncio.sleep(0.1)
            assert job.is_running and len(asyncio.all_tasks()) == before
            dashboard = job.dashboard()
            await seen(lambda: dashboard.bar.value > 3)
            assert "left" in dashboard.headline.value and not dashboard.stop.disabled
            assert dashboard.ranks.value.count("<td>running</td>") == 2
            assert dashboard.bar.max > 100
            os.kill(job.processes[1], signal.SIGKILL)
            await seen(lambda: "rank 1 was killed by SIGKILL" in dashboard.message.value, 20)
            assert dashboard.bar.bar_style == "danger" and dashboard.stop.description == "Ended"
            await seen(lambda: not dashboard.is_busy, 5)

        asyncio.run(watch())

    def test_a_run_of_a_terminal_is_watched_and_stopped(self, start, tiny_project):
        command = start(["-m", "horovod_lm.train", "--config", CONFIG, "--run-name", "terminal",
                         "--set", "training.max_steps=100000",
                         "--set", "training.num_epochs=100000"], ranks=2)  # fmt: skip
        folder = tiny_project / "runs" / "terminal"
        wait_until(lambda: (folder / "logs" / "rank1.jsonl").exists(), 60, "the run")

        async def watch() -> None:
            dashboard = Dashboard(folder)
            await seen(lambda: dashboard.bar.value > 0)
            assert dashboard.is_live
            dashboard.stop.click()
            assert dashboard.stop.disabled and dashboard.stop.description == "Stopping"
            await seen(lambda: "this run has ended" in dashboard.message.value, 30)
            assert dashboard.stop.description == "Ended"

        asyncio.run(watch())
        assert "stopped after step" in command.wait(20).output
