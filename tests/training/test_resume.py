"""Interrupted and resumed equals never interrupted: bit for bit at the same world size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch

from horovod_lm.data import load_preprocessed_data
from horovod_lm.train import run_distributed_training
from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.training.metrics import read_metrics
from horovod_lm.utils.config import load_config
from tests.conftest import ROOT

STEPS = 150  # time enough to interrupt a run half-way
FEW_STEPS = 40  # of runs that nobody interrupts, of more ranks than cores
RUN = ("--config", "configs/tiny.yaml", "--set", f"training.max_steps={STEPS}",
       "--set", "training.num_epochs=20", "--set", "training.eval_interval=50")  # fmt: skip


def final(run_dir: Path) -> dict:
    return read_checkpoint(run_dir / "checkpoints" / "final_model.pt")


def assert_same_run(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """Compare two runs' final parameters, moments, losses and position."""
    a, b = final(one), final(two)
    for name, tensor in a["model"].items():
        torch.testing.assert_close(b["model"][name], tensor, rtol=0, atol=tolerance)
    for number, state in a["optimizer"]["state"].items():
        for name, tensor in state.items():
            other = b["optimizer"]["state"][number][name]
            torch.testing.assert_close(other, tensor, rtol=0, atol=tolerance)
    position = ("epoch", "step", "global_step", "samples_seen", "tokens", "scaler")
    assert [a[key] for key in position] == [b[key] for key in position]
    rows, others = read_metrics(one), read_metrics(two)
    for row, other in zip(rows, others, strict=True):
        assert (row["phase"], row["step"]) == (other["phase"], other["step"])
        assert abs(row["loss"] - other["loss"]) <= tolerance
        assert row.get("learning_rate") == other.get("learning_rate")
    steps = [row["step"] for row in rows if row["phase"] == "train"]
    assert steps == list(range(1, a["global_step"] + 1))


def train_here(project: Path, name: str, settings, resume: Path | None = None) -> Path:
    """Train on one rank in this process; return the run's folder."""
    config = load_config(project / "configs" / "tiny.yaml", settings)
    return run_distributed_training(config, 0, 1, 0, resume, name).run_dir


def process_id(run_dir: Path, rank: int) -> int:
    """Return the process id that a rank wrote into its log when it started."""
    lines = (run_dir / "logs" / f"rank{rank}.jsonl").read_text().splitlines()
    return next(event["pid"] for event in map(json.loads, lines) if event["event"] == "start")


def steps_done(run_dir: Path) -> int:
    table = run_dir / "metrics.csv"
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tiny_project, start_for_module):
    """Runs that nothing interrupts, each made when it is first asked for."""

    @cache
    def run(ranks: int) -> Path:
        name = f"whole-{ranks}"
        arguments = ["-m", "horovod_lm.train", *RUN, "--run-name", name]
        finished = start_for_module(arguments, ranks).wait(180)
        assert finished.code == 0, finished.output[-4000:]
        return tiny_project / "runs" / name

    return run


# name: (settings, largest difference allowed)
ON_THREE_RANKS = {
    "groups": ({"distributed.reduction_groups": 1}, 0.0),
    # Without groups the ring's order of summation follows the timing. AdamW in float32 is not
    # here: it divides by the size of the gradient, and the keys' biases have none but rounding.
    "sgd": ({"training.optimizer": "sgd"}, 1e-6),
    "float64": ({"training.dtype": "float64"}, 1e-6),
}


@pytest.fixture(scope="module")
def resumed(tiny_project, start_for_module) -> Path:
    """Train every case on three ranks in one launch, and resume each near its end in another."""

    def train_cases(cases: dict[str, dict]) -> str:
        (tiny_project / "cases.json").write_text(json.dumps(cases))
        script = ROOT / "tests" / "ranks_train_cases.py"
        finished = start_for_module([str(script), "configs/tiny.yaml", "cases.json"], 3).wait(240)
        assert finished.code == 0, finished.output[-4000:]
        return finished.output

    few = {"training.max_steps": FEW_STEPS, "training.num_epochs": 20, "training.eval_interval": 50}
    cases = {name: {**few, **settings} for name, (settings, _) in ON_THREE_RANKS.items()}
    train_cases(cases)
    again = {}
    for name, settings in cases.items():
        folder = tiny_project / "runs" / f"{name}-again"
        shutil.copytree(folder.with_name(name), folder)
        [checkpoint] = folder.glob(f"checkpoints/*_step{FEW_STEPS - 10}.pt")
        for later in set(folder.glob("checkpoints/*.pt")) - {checkpoint}:
            later.unlink()
        again[folder.name] = {**settings, "resume": str(checkpoint)}
    output = train_cases(again)
    assert output.count(f"resuming at step {FEW_STEPS - 10} of {FEW_STEPS}") == len(cases)
    return tiny_project / "runs"


@pytest.mark.parametrize("case", ON_THREE_RANKS)
def test_three_ranks_resume_bit_equal_with_fixed_groups_and_nearly_without(resumed, case):
    _, tolerance = ON_THREE_RANKS[case]
    assert_same_run(resumed / case, resumed / f"{case}-again", tolerance)


@pytest.mark.parametrize("ranks", [0, 2])
def test_ctrl_c_stops_every_rank_saves_and_says_how_to_resume(
    tiny_project, start, uninterrupted, ranks
):
    name = f"stopped-{ranks}"
    folder = tiny_project / "runs" / name
    command = start(["-m", "horovod_lm.train", *RUN, "--run-name", name], ranks)
    command.wait_until(lambda: steps_done(folder) > STEPS // 3, timeout=90)
    command.process.send_signal(signal.SIGINT)
    finished = command.wait(20)
    assert finished.code == (0 if ranks else 130)
    assert command.left_behind() == []
    assert "Traceback" not in finished.output
    step = int(re.search(r"stopped after step (\d+); saved .+\.pt", finished.output).group(1))
    assert steps_done(folder) == step + len(read_metrics(folder, "validation"))

    advice = re.search(r"to resume: (?:horovodrun -np (\d+) )?python (-m .*)", finished.output)
    assert advice.group(1) == (str(ranks) if ranks else None)
    resumed = start(shlex.split(advice.group(2)), ranks).wait(180)
    assert resumed.code == 0, resumed.output[-4000:]
    assert f"resuming at step {step} of {STEPS}" in resumed.output
    assert_same_run(uninterrupted(ranks), folder)


def test_resume_at_another_world_size_sees_every_sample_once(tiny_project, train):
    settings = ["training.max_steps=null", "training.num_epochs=1",
                "training.checkpoint_interval=7", "training.keep_last_checkpoints=99"]  # fmt: skip
    overrides = [word for setting in settings for word in ("--set", setting)]
    train("--config", "configs/tiny.yaml", *overrides, "--run-name", "two", ranks=2)
    [checkpoint] = (tiny_project / "runs" / "two" / "checkpoints").glob("*_step14.pt")
    samples = read_checkpoint(checkpoint)["samples_seen"]
    assert samples == 14 * 2 * 4
    train_here(tiny_project, "then-one", settings, checkpoint)
    data, _ = load_preprocessed_data(tiny_project / "data")
    whole, mixed = (final(tiny_project / "runs" / name) for name in ("two", "then-one"))
    assert whole["tokens"] == mixed["tokens"] == data.num_tokens - 1
    assert mixed["global_step"] == 14 + -(-(len(data) - samples) // 4)
    assert mixed["epoch"] == 1 and mixed["samples_seen"] == 0


def test_best_loss_is_not_the_loss_of_the_checkpoint_that_was_loaded(tiny_project):
    settings = {"training.num_epochs": 20, "training.max_steps": 30}
    folder = train_here(tiny_project, "best", settings)
    losses = [row["loss"] for row in read_metrics(folder, "validation")]
    last = final(folder)
    assert last["best_loss"] == min(losses) != last["loss"]
    # A resumed run with a better best loss must not overwrite best_model.pt.
    best = folder / "checkpoints" / "best_model.pt"
    before = best.read_bytes()
    torch.save({**last, "best_loss": 0.001}, folder / "checkpoints" / "final_model.pt")
    train_here(tiny_project, "best", settings | {"training.max_steps": 40}, folder / "checkpoints")
    assert best.read_bytes() == before
