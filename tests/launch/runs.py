"""Runs of a copied project: their steps, and whether two of them are equal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.training.metrics import read_metrics


def copy_of(project: Path, place: Path) -> Path:
    """Copy a project without its runs."""
    for name in ("configs", "data"):
        shutil.copytree(project / name, place / name)
    return place


def wait_until(condition: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def steps_of(run_dir: Path) -> int:
    """Return the last step that a run has recorded."""
    if not (run_dir / "metrics.csv").is_file():
        return 0
    return max((row["step"] for row in read_metrics(run_dir)), default=0)


def assert_same_run(one: Path, two: Path) -> None:
    """Compare losses and parameters, bit for bit."""
    # Only of training: the validation of the step after which a rank was killed may be missing.
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(run, "train")] for run in (one, two)
    ]
    assert losses[0] == losses[1]
    final = [read_checkpoint(run / "checkpoints" / "final_model.pt")["model"] for run in (one, two)]
    assert all(torch.equal(final[1][name], tensor) for name, tensor in final[0].items())
