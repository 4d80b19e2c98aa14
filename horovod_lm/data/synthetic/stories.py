"""Tiny English stories with a known entropy, which is the minimum of the loss.

Story `index` of the series `seed` is a function of these two numbers, so a corpus of any size needs
no file:

    Once upon a time, Zoe left her tiny bell in the garden. "Who took my bell?" whispered Zoe. But
    that garden was windy all morning. Soon she met a busy squirrel digging a tunnel. They looked
    under a blanket and behind a well. The squirrel found it beside a mushroom. So Zoe clapped and
    danced with her dear bell in the same garden until the bells rang.

The name, the pronoun, the toy and the place of the first sentence are repeated in the last one,
some fifty words later: predicting them needs long-range attention. The second and the third
sentence repeat them at a short distance, which a small model learns first. The word before each
repetition is always the same ("my", "that", "dear", "same"), which tells one layer of attention
what to attend to.

Every story is one derivation of an unambiguous grammar: see `horovod_lm.data.synthetic.grammar`.
Hence `story_entropy()`, in nats per story, is the minimum of the mean loss of any language model,
and `story_log_probability` is the log-probability under the perfect model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from horovod_lm.data.synthetic.grammar import Alternative, Grammar

GIRLS = "Lily Anna Mia Zoe Ruby Emma Clara Nora".split()
BOYS = "Tom Ben Max Leo Sam Finn Jack Oscar".split()
GIRL = {"she": "she", "her": "her"}
BOY = {"she": "he", "her": "his"}

TOYS = "kite ball drum doll boat book hat bell cup flute scarf basket".split()
PLACES = {
    "in": "garden forest meadow".split(),
    "by": "river lake sea".split(),
    "on": "hill farm beach".split(),
    "at": "market mill school".split(),
}
# An animal's habit depends on its kind: frogs do not build nests.
FRIENDS = {
    "{bird_habit}": "owl robin crow dove".split(),
    "{pond_habit}": "duck frog otter turtle".split(),
    "{wood_habit}": "rabbit mouse squirrel hedgehog".split(),
    "{farm_habit}": "pony goat lamb pig".split(),
}

RULES: dict[str, Sequence[str | Alternative]] = {
    "story": [
        "{opening}, {hero=name} {lost} {hero.her} {colour} {toy=toys} {place=places}. "
        '"{question}" {asked} {hero}. '
        "But that {place.name} was {quiet} all {daytime}. "
        "Soon {hero.she} met {kind} {friend=animal} {friend.habit}. "
        "They looked under a {low} and behind a {high}. "
        "The {friend} {found} it beside {landmark}. "
        "So {hero} {smiled} and {played} with {hero.her} dear {toy} {place.again} until {late}."
    ],
    "opening": [Alternative("Once upon a time", weight=3), "One fine day", "Long ago"],
    "name": [
        *(Alternative(name, features=GIRL) for name in GIRLS),
        *(Alternative(name, features=BOY) for name in BOYS),
    ],
    "lost": "lost dropped forgot left".split(),
    "colour": (
        "red blue green yellow pink purple silver golden "
        "tiny big old new shiny pretty lovely striped"
    ).split(),
    "toys": TOYS,
    "places": [
        Alternative(
            f"{where} the {name}", features={"name": name, "again": f"{where} the same {name}"}
        )
        for where, names in PLACES.items()
        for name in names
    ],
    "question": [
        *("Have you seen my {toy}?", "Where is my {toy}?"),
        *("Who took my {toy}?", "Can you find my {toy}?"),
    ],
    "asked": "asked cried whispered called".split(),
    "quiet": (
        "quiet empty dark foggy windy rainy snowy cloudy cold warm sunny misty muddy calm"
    ).split(),
    "daytime": "day morning afternoon evening night week".split(),
    "kind": (
        "a wise, a shy, a funny, a sleepy, a brave, a gentle, "
        "a clever, a hungry, a busy, a polite, an honest, an elegant"
    ).split(", "),
    "animal": [
        Alternative(animal, features={"habit": habit})
        for habit, animals in FRIENDS.items()
        for animal in animals
    ],
    "bird_habit": [
        *("building a nest", "whistling a tune", "cleaning its wings", "resting on a branch"),
    ],
    "pond_habit": [
        *("floating on a leaf", "splashing about", "catching raindrops", "diving for shells"),
    ],
    "wood_habit": [
        *("picking berries", "counting nuts", "digging a tunnel", "sweeping its doorstep"),
    ],
    "farm_habit": [
        *("eating an apple", "chewing a carrot", "rolling in the mud", "chasing butterflies"),
    ],
    "low": "bench bush log table cart ladder blanket roof carpet cupboard wheel pillow".split(),
    "high": "wall fence tree rock gate shed haystack well curtain chimney barrel statue".split(),
    "found": "found saw spotted noticed".split(),
    "landmark": (
        "a stone, a snail, a flower, a ditch, a puppy, a mushroom, "
        "a scarecrow, a pumpkin, an egg, an oak, an onion, an anthill"
    ).split(", "),
    "smiled": "smiled laughed cheered clapped giggled jumped".split(),
    "played": "played danced sang skipped walked stayed".split(),
    "late": (
        "the moon rose, the stars came out, the sun set, it was dark, "
        "supper was ready, the bells rang, bedtime, midnight"
    ).split(", "),
}


@lru_cache(maxsize=1)
def story_grammar() -> Grammar:
    """Return the grammar of the stories."""
    return Grammar(RULES, start="story")


def generate_story(seed: int, index: int) -> str:
    """Return story `index` of the series `seed`, which is determined by these two numbers."""
    return story_grammar().sample(random.Random(f"{seed}/{index}"))


def generate_stories(count: int, seed: int) -> Iterator[str]:
    """Yield the first `count` stories of the series `seed`."""
    return (generate_story(seed, index) for index in range(count))


def story_log_probability(story: str) -> float:
    """Return the log-probability of `story` in nats; -inf if the grammar cannot generate it."""
    return story_grammar().log_probability(story)


def story_entropy() -> float:
    """Return the entropy of a story in nats: the minimum of the mean loss per story."""
    return story_grammar().entropy()


def story_count() -> int:
    """Return the number of different stories."""
    return story_grammar().count()
