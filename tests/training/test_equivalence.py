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
# name: (optimizer, dtype of the parameters, backward passes per step, tolerance)
CASES = {
    f"{optimizer}-{dtype}-{passes}": (optimizer, dtype, passes, tolerance)
    for optimizer, dtype, tolerance in (
        ("sgd", "float64", 1e-10),
        ("adamw", "float64", 1e-10),
        ("sgd", "float32", 1e-6),
    )
    for passes in (1, 4)
}
COMPILED = "sgd-float32-1"
CAN_COMPILE = " " not in torch.__file__  # torch does not quote its own folder for the linker


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
        if ranks == 2 and CAN_COMPILE:
            cases["compiled-on-2"] = settings(COMPILED, 2) | {"training.compile": True}
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
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_recorded_losses_are_those_of_the_whole_batch(trained, case):
    one, two = (read_metrics(trained / f"{case}-on-{ranks}") for ranks in (1, 2))
    assert [row["step"] for row in one if row["phase"] == "train"] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        assert [a[key] for key in ("phase", "step", "tokens")] == [
            b[key] for key in ("phase", "step", "tokens")
        ]
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["perplexity"], math.exp(a["loss"]), rel_tol=1e-12)
    rows = [row for row in two if row["phase"] == "train"]
    assert all(row["gradient_norm"] > CLIP for row in rows)  # every step was clipped
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a path without spaces")
def test_a_compiled_model_trains_like_an_eager_one_on_two_ranks(trained):
    eager, compiled = (parameters(trained, f"{name}-on-2") for name in (COMPILED, "compiled"))
    assert eager.keys() == compiled.keys()  # names without the prefix of torch.compile
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=1e-5)
    rows = [read_metrics(trained / f"{name}-on-2", "train") for name in (COMPILED, "compiled")]
    losses = [[row["loss"] for row in each] for each in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
