"""The filters by hand, and the frequencies of the sampled tokens (chi-square)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.generation.sampling import (
    filtered_probabilities,
    generation_config,
    make_generator,
    sample,
)
from horovod_lm.utils.config import GenerationConfig
from horovod_lm.utils.errors import ConfigError


def how(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    return generation_config(temperature=temperature, top_k=top_k, top_p=top_p)


def by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None):
    """Return probabilities, one token after another in descending order."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if temperature < 1e-6:
        return [float(token == order[0]) for token in range(len(logits))]
    order = order[: top_k or None]
    weights = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    kept, reached = {}, 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached < (top_p or 1.0):
            kept[token] = weight
        reached += weight / sum(weights)
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(logits))]


@settings(max_examples=60, deadline=None)
@given(
    # Each once: which of two equal logits is removed is not specified.
    logits=st.lists(
        st.integers(-60, 60).map(lambda n: n / 2), min_size=1, max_size=20, unique=True
    ),
    temperature=st.floats(0, 5),
    top_k=st.one_of(st.none(), st.integers(0, 30)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_any_setting_gives_the_distribution_by_hand(logits, temperature, top_k, top_p):
    settings = how(temperature, top_k, top_p)
    probabilities = filtered_probabilities(torch.tensor([logits]), settings)[0]
    assert probabilities.tolist() == pytest.approx(
        by_hand(logits, temperature, top_k, top_p), abs=1e-5
    )
    token = sample(torch.tensor([logits]), settings, make_generator(0, "cpu"))
    assert token.shape == (1,) and probabilities[token] > 0


def deviations(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations chi-square over the cells that can occur is above its mean."""
    possible = expected > 0
    assert not counts[~possible].any(), "a filtered token was sampled"
    freedom = int(possible.sum()) - 1
    squares = (counts - expected)[possible] ** 2 / expected[possible]
    return (squares.sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, 8, None), (1.3, None, 0.8), (0.8, 12, 0.9), (1.0, 50, 1.0)],
)
def test_frequencies_match_the_filtered_distribution(temperature, top_k, top_p):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 1.5
    settings = how(temperature, top_k, top_p)
    n_draws = 50_000
    drawn = sample(logits.expand(n_draws, -1), settings, make_generator(2, "cpu"))
    counts = drawn.bincount(minlength=30).double()
    expected = filtered_probabilities(logits, settings)[0].double() * n_draws
    # 4.5 would be passed by chance once in 300,000 seeds, and the seed is fixed.
    assert deviations(counts, expected) < 4.5
    # The test can fail: a temperature 5 % off does not pass.
    wrong = how(temperature * 1.05, top_k, top_p)
    wrong_expected = filtered_probabilities(logits, wrong)[0].double() * n_draws
    if ((wrong_expected > 0) == (expected > 0)).all():
        assert deviations(counts, wrong_expected) > 4.5


def test_each_row_is_sampled_from_its_own_distribution():
    logits = torch.full((4, 6), -math.inf)
    logits[range(4), [5, 0, 3, 2]] = 0.0
    assert sample(logits, how(), make_generator(0, "cpu")).tolist() == [5, 0, 3, 2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be greater than or equal to 0, not -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be greater than or equal to 0, not -1"),
        ({"top_p": 0.0}, "top_p must be greater than 0, not 0.0"),
        ({"num_samples": 0}, "num_samples must be greater than 0, not 0"),
    ],
)
def test_invalid_settings_are_one_sentence(change, sentence):
    assert generation_config() == GenerationConfig()
    with pytest.raises(ConfigError, match=f"invalid settings: generation.{sentence}") as error:
        generation_config(**change)
    assert "\n" not in str(error.value)
