"""A trained model reaches a loss near the exact entropy of its data."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.conftest import ROOT


@pytest.mark.horovod
@pytest.mark.slow
def test_tiny_ends_within_5_percent_of_the_exact_entropy(tiny_project, train):
    """The shipped `tiny.yaml`, unchanged, on two ranks."""
    shutil.copy(ROOT / "configs" / "tiny.yaml", tiny_project / "configs" / "shipped.yaml")
    train("--config", "configs/shipped.yaml", "--run-name", "stories", ranks=2, timeout=280)
    log = (tiny_project / "runs" / "stories" / "logs" / "rank0.jsonl").read_text().splitlines()
    (result,) = (event for event in map(json.loads, log) if event["event"] == "stories")
    assert 1.0 - 0.02 < result["nats_per_story"] / result["entropy_per_story"] < 1.05
