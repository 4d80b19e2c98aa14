"""A trained model reaches a loss near the exact entropy of its data."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


@pytest.fixture
def story_teller(tiny_project, train):
    """Train the shipped `tiny.yaml`, unchanged, on two ranks."""
    shutil.copy(CONFIGS / "tiny.yaml", tiny_project / "configs" / "shipped.yaml")
    train("--config", "configs/shipped.yaml", "--run-name", "stories", ranks=2, timeout=280)
    return tiny_project / "runs" / "stories"


@pytest.mark.horovod
@pytest.mark.slow
def test_tiny_ends_within_5_percent_of_the_exact_entropy_and_tells_whole_stories(story_teller):
    log = (story_teller / "logs" / "rank0.jsonl").read_text().splitlines()
    (result,) = (event for event in map(json.loads, log) if event["event"] == "stories")
    assert 1.0 - 0.02 < result["nats_per_story"] / result["entropy_per_story"] < 1.05

    from horovod_lm.generate import generate_text, load_model_for_generation

    model, tokenizer, _ = load_model_for_generation(story_teller, device="cpu")
    stories = generate_text(
        model, tokenizer, "Once upon a time", max_new_tokens=90, temperature=0.5, num_samples=20,
        seed=1,
    )  # fmt: skip
    tied = 0
    for story in stories:
        name, place = re.search(r"Once upon a time, (\w+) .* (\w+)\.", story.split('"')[0]).groups()
        last = story.rstrip().split(". ")[-1]
        tied += name in last and place in last
    assert tied >= 18, stories  # name and place come back some fifty words later
