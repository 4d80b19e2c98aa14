"""Entropy, count and probabilities against brute force on small grammars."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from horovod_lm.data.synthetic.grammar import Alternative, Grammar

GIRL, BOY = {"she": "she"}, {"she": "he"}

SMALL = Grammar(
    {
        "story": ["{hero=name} saw {friend=animal} {friend.habit}. {end}"],
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
        "bird_habit": [Alternative("flying", 7), "singing in {tree}"],
        "tree": ["an oak", "an elm"],
        "end": [Alternative("So {hero.she} thanked {friend}.", 4), "{hero} laughed."],
    }
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Lily saw a frog swimming.",
        "Lily saw a frog swimming. So he thanked a frog.",  # the pronoun is tied to the name
        "Lily saw a frog swimming. So she thanked an owl.",  # the friend is tied to the friend
        "Lily saw a frog flying. Lily laughed.",  # frogs do not fly
        "Lily saw a frog swimming. Lily laughed. ",
    ],
)
def test_a_text_that_cannot_be_written_has_probability_zero(text):
    assert SMALL.log_probability(text) == -math.inf


def test_samples_have_the_grammars_probabilities():
    generator, draws = random.Random(0), 20_000
    counts = Counter(SMALL.sample(generator) for _ in range(draws))
    expected = dict(SMALL.texts())
    assert set(counts) <= set(expected)
    chi_square = sum((counts[text] - draws * p) ** 2 / (draws * p) for text, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


@st.composite
def grammars(draw: st.DrawFn) -> Grammar:
    """Random unambiguous grammars: every alternative starts with a letter of its own."""
    weights = st.integers(1, 9)
    echoes = st.sampled_from(["{verb}", "fixed", "{verb}{verb}"])
    noun = [
        Alternative(letter, draw(weights), {"echo": draw(echoes)})
        for letter in "abcd"[: draw(st.integers(1, 4))]
    ]
    verb = [
        Alternative(letter + draw(st.sampled_from(["", "{tail}"])), draw(weights))
        for letter in "pqr"
    ]
    heads = st.sampled_from(["{one=noun}", "{verb}{one=noun}"])
    tails = st.sampled_from(["{one}", "{one.echo}", "{two.echo}{one.echo}", "{verb}", "{act}"])
    story = [
        Alternative(f"{letter}{draw(heads)}-{{two=noun}}{{act=verb}}-{draw(tails)}", draw(weights))
        for letter in "xy"
    ]
    return Grammar(
        {"story": story, "noun": noun, "verb": verb, "tail": ["s", Alternative("t", draw(weights))]}
    )


@settings(deadline=None, max_examples=30)
@given(grammars())
@example(SMALL)
def test_entropy_count_and_probabilities_equal_brute_force(grammar):
    texts = dict(grammar.texts())
    assert grammar.count() == len(texts) == len(list(grammar.texts()))
    assert math.fsum(texts.values()) == pytest.approx(1.0, abs=1e-12)
    brute_force = -math.fsum(p * math.log(p) for p in texts.values())
    assert grammar.entropy() == pytest.approx(brute_force, abs=1e-9)
    for text, probability in [*texts.items()][:30]:
        assert grammar.log_probability(text) == pytest.approx(math.log(probability), abs=1e-12)


def test_an_ambiguous_grammar_is_detected():
    grammar = Grammar({"story": ["{a}{b}"], "a": ["x", "xy"], "b": ["yz", "z"]})
    with pytest.raises(ValueError, match="ambiguous"):
        grammar.log_probability("xyz")


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"story": ["{hero=nobody}"]}, "no symbol 'nobody'"),
        ({"story": []}, "needs alternatives"),
        ({"story": [Alternative("x", 0)]}, "weights above 0"),
    ],
)
def test_invalid_rules_are_refused(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        Grammar(rules)
