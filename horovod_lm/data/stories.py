"""Tiny English stories with a known entropy: a corpus whose best possible loss is known exactly.

Story `index` of seed `seed` is a pure function of the two, so that a corpus of any size needs no file:

    >>> generate_story(seed=0, index=0)

The hero's name, the pronoun that goes with it, the lost thing and the place of the first sentence come
back in the last one, some fifty words later: a model that looks only at the last few words cannot know
them, and one with attention can. Each story is one derivation of an unambiguous grammar (see
`horovod_lm.data.grammar`), which makes `story_entropy()`, in nats per story, the smallest loss that any
language model can reach on them, and `story_log_probability` the score of the perfect model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

from horovod_lm.data.grammar import Alternative, Grammar

GIRLS = "Lily Anna Mia Zoe Ruby Emma Clara Nora Ida Rose".split()
BOYS = "Tom Ben Max Leo Sam Finn Jack Oscar Theo Hugo".split()
GIRL = {"she": "she", "She": "She", "her": "her"}
BOY = {"she": "he", "She": "He", "her": "his"}

# A friend's habit depends on what kind of animal it is: frogs do not build nests.
FRIENDS = {
    "{bird_habit}": "owl robin crow dove".split(),
    "{pond_habit}": "duck frog otter turtle".split(),
    "{wood_habit}": "rabbit mouse squirrel hedgehog".split(),
    "{farm_habit}": "pony goat lamb pig".split(),
}

RULES: dict[str, list[str | Alternative]] = {
    "story": [
        "{opening}, {hero=name} {lost} {hero.her} {colour} {thing=toy} {spot=place}. "
        "It was {weather} {daytime}. "
        "Soon {hero.she} met {kind} {friend=animal} {friend.habit}. "
        '"{question}" {asked} {hero}. '
        "They looked under the {low} and behind the {high}. "
        "The {friend} {found} the {thing} beside {landmark}. "
        "{ending}"
    ],
    "opening": [Alternative("Once upon a time", weight=3), "One fine day", "Long ago"],
    "name": [Alternative(name, features=GIRL) for name in GIRLS] + [Alternative(name, features=BOY) for name in BOYS],
    "lost": ["lost", "dropped", "forgot", "left"],
    "colour": "red blue green yellow pink purple silver golden tiny big old new shiny pretty lovely striped".split(),
    "toy": "kite ball drum doll boat book hat bell lamp cup ring flute spoon basket scarf button".split(),
    "place": [
        *("in the garden", "in the forest", "in the meadow", "in the barn"),
        *("by the river", "by the lake", "by the sea", "by the bridge"),
        *("on the hill", "on the farm", "on the beach", "on the island"),
        *("at the market", "at the mill", "at the school", "at the castle"),
    ],
    "weather": [
        *("a sunny", "a windy", "a rainy", "a snowy", "a foggy", "a cloudy"),
        *("a warm", "a cold", "a quiet", "a bright", "an icy", "an ordinary"),
    ],
    "daytime": ["morning", "afternoon", "evening", "day"],
    "kind": [
        *("a wise", "a shy", "a funny", "a sleepy", "a brave", "a gentle", "a clever", "a hungry", "a busy", "a polite"),
        *("an honest", "an elegant"),
    ],
    "animal": [
        Alternative(animal, features={"habit": habit}) for habit, animals in FRIENDS.items() for animal in animals
    ],
    "bird_habit": ["building a nest", "whistling a tune", "cleaning its wings", "resting on a branch"],
    "pond_habit": ["floating on a leaf", "splashing in a puddle", "catching raindrops", "diving for shells"],
    "wood_habit": ["picking berries", "counting nuts", "digging a tunnel", "sweeping its doorstep"],
    "farm_habit": ["eating an apple", "chewing a carrot", "rolling in the mud", "chasing butterflies"],
    "question": ["Have you seen my {thing}?", "Where is my {thing}?", "Can you find my {thing}?", "Who took my {thing}?"],
    "asked": ["asked", "cried", "whispered", "called"],
    "low": "bench bush log table cart ladder blanket roof carpet cupboard wheel pillow".split(),
    "high": "wall fence tree rock gate shed haystack well curtain chimney barrel statue".split(),
    "found": ["found", "saw", "spotted", "noticed"],
    "landmark": [
        *("a stone", "a snail", "a flower", "a ditch", "a puppy", "a mushroom", "a scarecrow", "a pumpkin"),
        *("an egg", "an oak", "an onion", "an anthill"),
    ],
    "ending": [
        "{hero} {smiled}, and {hero.she} {played} with {hero.her} {thing} {spot} until {late}.",
    ],
    "smiled": ["smiled", "laughed", "cheered", "clapped", "giggled", "jumped"],
    "played": ["played", "danced", "sang", "skipped", "ran", "sat"],
    "late": [
        *("the moon rose", "the stars came out", "the sun set", "it was dark"),
        *("supper was ready", "the bells rang", "bedtime", "midnight"),
    ],
}


@lru_cache(maxsize=1)
def story_grammar() -> Grammar:
    """Return the grammar of the stories."""
    return Grammar(RULES, start="story")


def generate_story(seed: int, index: int) -> str:
    """Return story number `index` of the endless series `seed`. The same two numbers give the same story."""
    return story_grammar().sample(random.Random(f"{seed}/{index}"))


def generate_stories(count: int, seed: int) -> Iterator[str]:
    """Yield the first `count` stories of the series `seed`."""
    return (generate_story(seed, index) for index in range(count))


def story_log_probability(story: str) -> float:
    """Return the log of the probability that the grammar writes `story`, in nats; -inf if it cannot."""
    return story_grammar().log_probability(story)


def story_entropy() -> float:
    """Return the entropy of a story in nats: the smallest mean loss per story that any model can reach."""
    return story_grammar().entropy()


def story_count() -> int:
    """Return how many different stories there are."""
    return story_grammar().count()
