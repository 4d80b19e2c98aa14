"""Probabilistic grammars whose entropy is known exactly.

A grammar writes a text by replacing its leftmost symbol, again and again, with one of the symbol's
alternatives, drawn with known probabilities. When every text can be written in one way only (the
grammar is *unambiguous*), texts and sequences of draws are the same thing, so that

- the probability of a text is the product of the probabilities of its draws, found by parsing it;
- the entropy of a text is the sum, along the draws, of each draw's entropy given the draws before
  it: the chain rule, H(X1, X2, ...) = H(X1) + H(X2 | X1) + ... (Cover & Thomas, Elements of
  Information Theory, 2nd ed., theorem 2.5.1).

No model of these texts can have a smaller mean loss than that entropy; the best one has just it.
"""

from __future__ import annotations

import bisect
import graphlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

SLOT = re.compile(r"\{(?:(\w+)=)?(\w+)(?:\.(\w+))?\}")


@dataclass(frozen=True)
class Alternative:
    """One way to write a symbol.

    Args:
        text: plain text with slots: `{animal}` writes the symbol `animal`; `{friend=animal}` does
            so and remembers the draw as `friend`; `{friend}` repeats the remembered text;
            `{friend.habit}` writes the remembered draw's feature `habit`.
        weight: how often, relative to the symbol's other alternatives.
        features: what else is known about it, as texts that may hold slots in their turn.
    """

    text: str
    weight: float = 1.0
    features: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Draw:
    """A slot that draws one of the alternatives of `symbol`, and may remember it as `name`."""

    symbol: str
    name: str | None = None


@dataclass(frozen=True)
class Recall:
    """A slot that writes a feature of the draw remembered as `name` (`text`: the draw itself)."""

    name: str
    feature: str = "text"


Part = str | Draw | Recall
Parts = tuple[Part, ...]
Memory = Mapping[str, Alternative]


class Grammar:
    """A finite, unambiguous, probabilistic grammar with memory.

    Args:
        rules: for each symbol its alternatives: plain strings weigh 1 and have no features.
        start: the symbol that writes a whole text.

    Raises:
        ValueError: the rules cannot work; the message says which and why.
    """

    def __init__(
        self, rules: Mapping[str, Sequence[str | Alternative]], start: str = "story"
    ) -> None:
        self.start = start
        self.rules = {
            symbol: [Alternative(one) if isinstance(one, str) else one for one in alternatives]
            for symbol, alternatives in rules.items()
        }
        self._probabilities: dict[str, list[float]] = {}
        self._cumulative: dict[str, list[float]] = {}
        for symbol, alternatives in self.rules.items():
            if not alternatives or any(one.weight <= 0 for one in alternatives):
                raise ValueError(
                    f"the symbol {symbol!r} needs alternatives, each with a weight above 0"
                )
            total = math.fsum(one.weight for one in alternatives)
            self._probabilities[symbol] = [one.weight / total for one in alternatives]
            self._cumulative[symbol] = list(itertools.accumulate(self._probabilities[symbol]))
        self._parts = {text: self._split(text) for text in self._all_texts()}
        self._check_slots()

    def sample(self, generator: random.Random) -> str:
        """Write one text, drawn with the grammar's probabilities."""
        pending, memory, written = [Draw(self.start)], {}, []
        while pending:
            part = pending.pop()
            if isinstance(part, str):
                written.append(part)
            elif isinstance(part, Recall):
                pending.extend(reversed(self._recalled(part, memory)))
            else:
                cumulative = self._cumulative[part.symbol]
                index = bisect.bisect_right(cumulative, generator.random(), hi=len(cumulative) - 1)
                alternative = self.rules[part.symbol][index]
                if part.name:
                    memory[part.name] = alternative
                pending.extend(reversed(self._parts[alternative.text]))
        return "".join(written)

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield every text with its probability. For small grammars: there may be very many."""

        def write(parts: Parts, memory: Memory) -> Iterator[tuple[str, float]]:
            if not parts:
                yield "", 1.0
            elif isinstance(parts[0], str):
                for text, probability in write(parts[1:], memory):
                    yield parts[0] + text, probability
            else:
                for first, after, then in self._expansions(parts, memory):
                    for text, probability in write(after, then):
                        yield text, first * probability

        return write((Draw(self.start),), {})

    def log_probability(self, text: str) -> float:
        """Return the log-probability of `text` in nats; -inf if the grammar cannot write it.

        Raises:
            ValueError: `text` can be written in two ways: the grammar is ambiguous.
        """

        def parse(parts: Parts, memory: Memory, position: int) -> Iterator[float]:
            if not parts:
                if position == len(text):
                    yield 0.0
            elif isinstance(parts[0], str):
                if text.startswith(parts[0], position):
                    yield from parse(parts[1:], memory, position + len(parts[0]))
            else:
                for first, after, then in self._expansions(parts, memory):
                    for rest in parse(after, then, position):
                        yield math.log(first) + rest

        found = list(itertools.islice(parse((Draw(self.start),), {}, 0), 2))
        if len(found) > 1:
            raise ValueError(f"the grammar is ambiguous: it can write this in two ways: {text!r}")
        return found[0] if found else -math.inf

    @cached_property
    def _size(self) -> tuple[int, float]:
        """The number of texts and the entropy of one in nats, by the chain rule along the draws.

        What is still to be drawn depends on the slots left to fill and on the remembered features
        that hold draws themselves, and on nothing else. The cache therefore makes of a sum over all
        texts one that is hardly longer than the grammar.
        """

        @cache
        def measure(slots: Parts, memory: tuple[tuple[str, Alternative], ...]) -> tuple[int, float]:
            if not slots:
                return 1, 0.0
            count, entropy = 0, 0.0
            for probability, after, then in self._expansions(slots, dict(memory)):
                rest = tuple(part for part in after if not isinstance(part, str))
                still_open = tuple(
                    (name, self._without_fixed_texts(one)) for name, one in sorted(then.items())
                )
                rest_count, rest_entropy = measure(rest, still_open)
                count += rest_count
                entropy += probability * (rest_entropy - math.log(probability))
            return count, entropy

        return measure((Draw(self.start),), ())

    def count(self) -> int:
        """Return how many different texts the grammar can write, exactly."""
        return self._size[0]

    def entropy(self) -> float:
        """Return the entropy of a text in nats: the smallest mean loss that any model can reach."""
        return self._size[1]

    def _expansions(self, parts: Parts, memory: Memory) -> Iterator[tuple[float, Parts, Memory]]:
        """Yield every way to replace the slot `parts[0]`.

        Yields:
            The way's probability, the parts that are then left, and what is then remembered.
        """
        slot, rest = parts[0], parts[1:]
        if isinstance(slot, Recall):
            yield 1.0, self._recalled(slot, memory) + rest, memory
        elif isinstance(slot, Draw):
            probabilities, alternatives = self._probabilities[slot.symbol], self.rules[slot.symbol]
            for probability, alternative in zip(probabilities, alternatives, strict=True):
                then = {**memory, slot.name: alternative} if slot.name else memory
                yield probability, self._parts[alternative.text] + rest, then

    def _recalled(self, slot: Recall, memory: Memory) -> Parts:
        alternative = memory[slot.name]
        text = alternative.text if slot.feature == "text" else alternative.features[slot.feature]
        return self._parts[text]

    def _without_fixed_texts(self, alternative: Alternative) -> Alternative:
        """Return what of a remembered draw matters to draws to come: its features that draw."""
        features = {
            name: text if "{" in text else "" for name, text in alternative.features.items()
        }
        return Alternative("", features=features)

    def _split(self, text: str) -> Parts:
        """Cut a text at its slots: `"{hero=name} ran"` becomes `(Draw("name", "hero"), " ran")`."""
        parts: list[Part] = []
        position = 0
        for match in SLOT.finditer(text):
            parts += [text[position : match.start()]] if match.start() > position else []
            remembered_as, symbol, feature = match.groups()
            if remembered_as or (symbol in self.rules and not feature):
                if symbol not in self.rules:
                    raise ValueError(
                        f"there is no symbol {symbol!r} for the slot {match.group()} in {text!r}"
                    )
                parts.append(Draw(symbol, remembered_as))
            else:
                parts.append(Recall(symbol, feature or "text"))
            position = match.end()
        return (*parts, *([text[position:]] if position < len(text) else []))

    def _all_texts(self) -> Iterator[str]:
        yield ""
        for alternative in itertools.chain.from_iterable(self.rules.values()):
            yield alternative.text
            yield from alternative.features.values()

    def _check_slots(self) -> None:
        """Refuse rules that never end, and slots that repeat what is not there to be repeated."""
        remembered: dict[str, list[Alternative]] = {}
        for slot in itertools.chain.from_iterable(self._parts.values()):
            if isinstance(slot, Draw) and slot.name:
                remembered.setdefault(slot.name, []).extend(self.rules[slot.symbol])
        for slot in itertools.chain.from_iterable(self._parts.values()):
            if not isinstance(slot, Recall):
                continue
            if slot.name not in remembered:
                raise ValueError(
                    f"nothing is remembered as {slot.name!r}, and no symbol has that name"
                )
            for one in remembered[slot.name]:
                if slot.feature not in ("text", *one.features):
                    raise ValueError(f"{one.text!r} has no feature {slot.feature!r}")
                if slot.feature == "text" and "{" in one.text:
                    raise ValueError(f"{one.text!r} cannot be repeated: its slots would draw again")
        self._check_that_it_ends()

    def _check_that_it_ends(self) -> None:
        leads_to: dict[str, set[str]] = {}
        for symbol, alternatives in self.rules.items():
            texts = [text for one in alternatives for text in (one.text, *one.features.values())]
            slots = itertools.chain.from_iterable(self._parts[text] for text in texts)
            leads_to[symbol] = {slot.symbol for slot in slots if isinstance(slot, Draw)}
        try:
            graphlib.TopologicalSorter(leads_to).prepare()
        except graphlib.CycleError as error:
            cycle = " -> ".join(error.args[1])
            raise ValueError(f"symbols lead back to themselves: {cycle}") from None
