"""One rank with batch 2B and two ranks with batch B are the same training.

Real `horovodrun` ranks train; their final parameters are compared, not their losses alone.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.training.metrics import read_metrics
from tests.conftest import ROOT

STEPS = 20
CLIP = 0.05  # low enough that every step is clipped: the test below makes sure of it
# name: (optimizer, type of the parameters, backward passes per step, largest difference allowed)
CASES = {
    f"{optimizer}-{dtype}-{passes}": (optimizer, dtype, passes, tolerance)
    for optimizer, dtype, tolerance in (
        ("sgd", "float64", 1e-10),
        ("adamw", "float64", 1e-10),
        ("sgd", "float32", 1e-6),
    )
    for passes in (1, 4)
}


def settings(case: str, ranks: int) -> dict[str, object]:
    """Return a case's settings: the batch of all ranks is 8 blocks times the backward passes."""
    optimizer, dtype, passes, _ = CASES[case]
    return {
        "training.optimizer": optimizer,
        "training.dtype": dtype,
        "training.gradient_accumulation_steps": passes,
        "training.per_gpu_batch_size": 8 // ranks,
        "training.max_grad_norm": CLIP,
        "training.max_steps": STEPS,
        "training.num_epochs": 20,
        "training.checkpoint_interval": 100,
        "model.dropout": 0.0,
    }


@pytest.fixture(scope="module")
def trained(tiny_project, request):
    """Train every case on one rank and on two, in two launches of `horovodrun`."""
    start = request.getfixturevalue("start_for_module")
    for ranks in (1, 2):
        cases = {f"{case}-on-{ranks}": settings(case, ranks) for case in CASES}
        (tiny_project / f"cases{ranks}.json").write_text(json.dumps(cases))
        script = ROOT / "tests" / "ranks_train_cases.py"
        arguments = [str(script), "configs/tiny.yaml", f"cases{ranks}.json"]
        finished = start(arguments, ranks=ranks).wait(300)
        assert finished.code == 0, finished.output[-4000:]
    return tiny_project / "runs"


def parameters(runs, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(runs / name / "checkpoints" / "final_model.pt")["model"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(trained, case):
    tolerance = CASES[case][3]
    one, two = parameters(trained, f"{case}-on-1"), parameters(trained, f"{case}-on-2")
    assert one.keys() == two.keys()
    for name in one:
        difference = (one[name] - two[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_recorded_losses_are_those_of_the_whole_batch(trained, case):
    one, two = (read_metrics(trained / f"{case}-on-{ranks}") for ranks in (1, 2))
    assert [row["step"] for row in one if row["phase"] == "train"] == list(range(1, STEPS + 1))
    assert [(row["phase"], row["step"], row["tokens"]) for row in one] == [
        (row["phase"], row["step"], row["tokens"]) for row in two
    ]
    for a, b in zip(one, two, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["perplexity"], math.exp(a["loss"]), rel_tol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_every_step_was_clipped_and_moved(trained, case):
    rows = read_metrics(trained / f"{case}-on-2", "train")
    assert all(row["gradient_norm"] > CLIP for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
