"""Interrupted and resumed equals never interrupted: bit for bit at the same world size."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch

from horovod_lm.data import load_preprocessed_data
from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.training.metrics import read_metrics
from tests.conftest import ROOT

STEPS = 150  # time enough to interrupt a run half-way
FEW_STEPS = 40  # of runs that nobody interrupts, of more ranks than cores
RUN = ("--config", "configs/tiny.yaml", "--set", f"training.max_steps={STEPS}",
       "--set", "training.num_epochs=20", "--set", "training.eval_interval=50")  # fmt: skip


def final(run_dir: Path) -> dict:
    return read_checkpoint(run_dir / "checkpoints" / "final_model.pt")


def assert_same_run(one: Path, two: Path, tolerance: float = 0.0, steps: int = STEPS) -> None:
    """Compare two runs' final parameters, moments, losses and position."""
    a, b = final(one), final(two)
    for name, tensor in a["model"].items():
        assert (tensor - b["model"][name]).abs().max().item() <= tolerance, name
    for number, state in a["optimizer"]["state"].items():
        for name, tensor in state.items():
            difference = tensor - b["optimizer"]["state"][number][name]
            assert difference.abs().max().item() <= tolerance, (number, name)
    position = ("epoch", "step", "global_step", "samples_seen", "tokens")
    assert [a[key] for key in position] == [b[key] for key in position]
    rows, others = (read_metrics(run, "train") for run in (one, two))
    assert (
        [row["step"] for row in rows] == [row["step"] for row in others] == [*range(1, steps + 1)]
    )
    for row, other in zip(rows, others, strict=True):
        assert abs(row["loss"] - other["loss"]) <= tolerance
        assert row["learning_rate"] == other["learning_rate"]
    evaluations = [[row["loss"] for row in read_metrics(run, "validation")] for run in (one, two)]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=tolerance, rel=0)


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


@pytest.mark.parametrize(("ranks", "victim"), [(0, 0), (2, 0), (2, 1)])
def test_killed_in_an_epoch_and_resumed_is_bit_equal(
    tiny_project, start, train, uninterrupted, ranks, victim
):
    name = f"killed-{ranks}-{victim}"
    folder = tiny_project / "runs" / name
    command = start(["-m", "horovod_lm.train", *RUN, "--run-name", name], ranks)
    command.wait_until(lambda: steps_done(folder) > STEPS // 3, timeout=90)
    os.kill(process_id(folder, victim), signal.SIGKILL)
    finished = command.wait(30)
    assert finished.code != 0
    assert command.left_behind() == []
    assert not (folder / "checkpoints" / "final_model.pt").exists()

    resumed = train("--resume", "auto", "--run-name", name, ranks=ranks)
    step = int(re.search(r"resuming at step (\d+)", resumed.output).group(1))
    assert 0 < step < STEPS
    assert_same_run(uninterrupted(ranks), folder)


# ranks -> name: (settings, largest difference allowed)
MORE_RANKS = {
    3: {
        "groups": ({"distributed.reduction_groups": 1}, 0.0),
        # Without groups the ring's order of summation follows the timing. AdamW in float32 is not
        # here: it divides by the size of the gradient, and the keys' biases have none but rounding.
        "sgd": ({"training.optimizer": "sgd"}, 1e-6),
        "float64": ({"training.dtype": "float64"}, 1e-6),
    },
    4: {"groups": ({"distributed.reduction_groups": 1}, 0.0)},
}


@pytest.fixture(scope="module")
def resumed(tiny_project, start_for_module):
    """Train every case on so many ranks in one launch, and resume each near its end in another."""

    def train_cases(ranks: int, cases: dict[str, dict]) -> str:
        (tiny_project / "cases.json").write_text(json.dumps(cases))
        script = ROOT / "tests" / "ranks_train_cases.py"
        arguments = [str(script), "configs/tiny.yaml", "cases.json"]
        finished = start_for_module(arguments, ranks).wait(240)
        assert finished.code == 0, finished.output[-4000:]
        return finished.output

    @cache
    def run(ranks: int) -> Path:
        few = {"training.max_steps": FEW_STEPS, "training.num_epochs": 20,
               "training.eval_interval": 50}  # fmt: skip
        cases = {
            f"{name}-on-{ranks}": {**few, **settings}
            for name, (settings, _) in MORE_RANKS[ranks].items()
        }
        train_cases(ranks, cases)
        again = {}
        for name, settings in cases.items():
            folder = tiny_project / "runs" / f"{name}-again"
            shutil.copytree(folder.with_name(name), folder)
            [checkpoint] = folder.glob(f"checkpoints/*_step{FEW_STEPS - 10}.pt")
            for later in set(folder.glob("checkpoints/*.pt")) - {checkpoint}:
                later.unlink()
            again[folder.name] = {**settings, "resume": str(checkpoint)}
        output = train_cases(ranks, again)
        assert output.count(f"resuming at step {FEW_STEPS - 10} of {FEW_STEPS}") == len(cases)
        return tiny_project / "runs"

    return run


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in MORE_RANKS.items() for case in cases]
)
def test_more_ranks_resume_bit_equal_with_fixed_groups_and_nearly_without(resumed, ranks, case):
    _, tolerance = MORE_RANKS[ranks][case]
    name = f"{case}-on-{ranks}"
    runs = resumed(ranks)
    assert_same_run(runs / name, runs / f"{name}-again", tolerance, FEW_STEPS)


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
    step = int(re.search(r"stopped after step (\d+); saved \S+\.pt", finished.output).group(1))
    assert steps_done(folder) == step + len(read_metrics(folder, "validation"))

    advice = re.search(r"to resume: (?:horovodrun -np (\d+) )?python (-m .*)", finished.output)
    assert advice.group(1) == (str(ranks) if ranks else None)
    resumed = start(shlex.split(advice.group(2)), ranks).wait(180)
    assert resumed.code == 0, resumed.output[-4000:]
    assert f"resuming at step {step} of {STEPS}" in resumed.output
    assert_same_run(uninterrupted(ranks), folder)


def test_resume_at_another_world_size_sees_every_sample_once(tiny_project, train):
    epoch = ("--config", "configs/tiny.yaml", "--set", "training.max_steps=null")
    train(*epoch, "--set", "training.num_epochs=1", "--set", "training.checkpoint_interval=7",
          "--set", "training.keep_last_checkpoints=100", "--run-name", "two", ranks=2)  # fmt: skip
    checkpoint = next((tiny_project / "runs" / "two" / "checkpoints").glob("*_step14.pt"))
    samples = read_checkpoint(checkpoint)["samples_seen"]
    assert samples == 14 * 2 * 4
    train("--resume", str(checkpoint), "--run-name", "then-one")
    data, _ = load_preprocessed_data(tiny_project / "data")
    whole, mixed = (final(tiny_project / "runs" / name) for name in ("two", "then-one"))
    assert whole["tokens"] == mixed["tokens"] == data.num_tokens - 1
    assert mixed["global_step"] == 14 + -(-(len(data) - samples) // 4)
    assert mixed["epoch"] == 1 and mixed["samples_seen"] == 0


def test_best_loss_is_not_the_loss_of_the_checkpoint_that_was_loaded(tiny_project, train):
    train(*RUN, "--run-name", "best", "--set", "training.max_steps=30", "--set",
          "training.eval_interval=10")  # fmt: skip
    folder = tiny_project / "runs" / "best"
    losses = [row["loss"] for row in read_metrics(folder, "validation")]
    last = final(folder)
    assert last["best_loss"] == min(losses) != last["loss"]
    assert torch.isfinite(torch.tensor(last["loss"]))
    # A run that goes on after a far better best must leave best_model.pt alone.
    best = folder / "checkpoints" / "best_model.pt"
    before = best.read_bytes()
    content = torch.load(folder / "checkpoints" / "final_model.pt", weights_only=True)
    torch.save({**content, "best_loss": 0.001}, folder / "checkpoints" / "final_model.pt")
    train("--resume", "auto", "--run-name", "best", "--set", "training.max_steps=50")
    assert best.read_bytes() == before
