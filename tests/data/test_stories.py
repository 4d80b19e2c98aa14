"""The stories: entropy against samples, repetitions, grammar and variety."""

from __future__ import annotations

import itertools
import math
import re
import statistics

import pytest

from horovod_lm.data.synthetic.stories import (
    RULES,
    generate_stories,
    generate_story,
    story_count,
    story_entropy,
    story_grammar,
    story_log_probability,
)

STORIES = list(generate_stories(2000, seed=0))


def test_count_and_entropy_are_those_of_independent_draws():
    sizes = {symbol: len(alternatives) for symbol, alternatives in RULES.items()}
    habits = {size for symbol, size in sizes.items() if symbol.endswith("_habit")}
    assert habits == {4}  # every friend has as many habits, so the count is one product
    drawn = [symbol for symbol in sizes if symbol != "story" and not symbol.endswith("_habit")]
    assert story_count() == 4 * math.prod(sizes[symbol] for symbol in drawn) > 10**12
    uniform = math.log(story_count() / 3)  # all but the opening
    opening = -sum(p * math.log(p) for p in (0.6, 0.2, 0.2))
    assert story_entropy() == pytest.approx(uniform + opening, abs=1e-9)


def test_every_story_is_parsed_and_scores_the_entropy_on_average():
    scores = [-story_log_probability(story) for story in STORIES]
    error = statistics.stdev(scores) / math.sqrt(len(scores))
    assert statistics.mean(scores) == pytest.approx(story_entropy(), abs=4 * error)
    assert error < 0.02  # nats, so that the line above says something


def test_no_text_of_a_symbol_begins_another_so_that_every_story_parses_in_one_way():
    """Read from the left, each draw is then told by the text: the grammar is unambiguous."""
    rules = dict(story_grammar().rules)
    assert len(rules.pop("story")) == 1
    for symbol, alternatives in rules.items():
        texts = [one.text.replace("{toy}", "TOY") for one in alternatives]
        assert not any("{" in text for text in texts)
        for one, other in itertools.permutations(texts, 2):
            assert not other.startswith(one), (symbol, one, other)


@pytest.mark.parametrize(
    "pattern", [r"So \w+", r"with (her|his)", r"dear \w+", r"same \w+", r"The \w+"]
)
def test_another_word_where_one_is_repeated_makes_a_story_impossible(pattern):
    story = generate_story(0, 1)
    seen = {re.search(pattern, other).group() for other in STORIES[:500]}
    assert len(seen) > 1
    for replacement in seen:
        changed = re.sub(pattern, replacement, story)
        assert (changed == story) == (story_log_probability(changed) > -math.inf)


def test_articles_fit_the_words_after_them():
    for story in STORIES:
        assert not re.search(r"\ba [aeiou]|\ban (?!honest)[^aeiou]", story), story


def test_a_story_is_a_function_of_seed_and_index():
    assert STORIES[:5] == [generate_story(0, index) for index in range(5)]
    assert len({generate_story(seed, index) for seed in range(10) for index in range(100)}) == 1000
