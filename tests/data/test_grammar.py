"""Entropy, count and probabilities against brute force on a small grammar."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from horovod_lm.data.synthetic.grammar import Alternative, Grammar

GIRL, BOY = {"she": "she"}, {"she": "he"}

SMALL = Grammar(
    {
        "story": ["{hero=name} saw {friend=animal} {friend.habit} and {friend.habit}. {end}"],
        "name": [
            Alternative("Lily", 3, GIRL),
            Alternative("Mia", 1, GIRL),
            Alternative("Tom", 2, BOY),
        ],
        "animal": [
            Alternative("an owl", 1, {"habit": "{bird_habit}"}),
            Alternative("a crow", 2, {"habit": "{bird_habit}"}),
            Alternative("a frog", 5, {"habit": "swimming"}),
        ],
        "bird_habit": [Alternative("flying", 2), "singing in {tree}"],
        "tree": ["an oak", "an elm"],
        "end": [Alternative("So {hero.she} thanked {friend}.", 4), "{hero} laughed."],
    }
)


def test_samples_have_the_grammars_probabilities():
    generator, draws = random.Random(0), 20_000
    counts = Counter(SMALL.sample(generator) for _ in range(draws))
    expected = dict(SMALL.texts())
    assert set(counts) <= set(expected)
    chi_square = sum((counts[text] - draws * p) ** 2 / (draws * p) for text, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_entropy_count_and_probabilities_equal_brute_force():
    texts = dict(SMALL.texts())
    assert SMALL.count() == len(texts) == len(list(SMALL.texts()))
    assert math.fsum(texts.values()) == pytest.approx(1.0, abs=1e-12)
    brute_force = -math.fsum(p * math.log(p) for p in texts.values())
    assert SMALL.entropy() == pytest.approx(brute_force, abs=1e-9)
    for text, probability in texts.items():
        assert SMALL.log_probability(text) == pytest.approx(math.log(probability), abs=1e-12)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"story": ["{hero=nobody}"]}, "no symbol 'nobody'"),
        ({"story": []}, "needs alternatives"),
        ({"story": [Alternative("x", 0)]}, "weights above 0"),
        ({"story": ["{a}{b}"], "a": ["x", "xy"], "b": ["yz", "z"]}, "ambiguous"),
    ],
)
def test_invalid_rules_are_refused(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        Grammar(rules).log_probability("xyz")
