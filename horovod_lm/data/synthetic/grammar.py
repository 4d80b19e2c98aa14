"""Probabilistic grammars with a known entropy.

A grammar generates a text by replacing its leftmost symbol, repeatedly, with one of the symbol's
alternatives, drawn with known probabilities. If every text has exactly one derivation (the grammar
is *unambiguous*), a text corresponds to one sequence of draws, so that

- the probability of a text is the product of the probabilities of its draws, found by parsing;
- the entropy of a text is the sum of the draws' entropies, each given the earlier draws: the chain
  rule, H(X1, X2, ...) = H(X1) + H(X2 | X1) + ... (Cover & Thomas, Elements of Information Theory,
  2nd ed., theorem 2.5.1).

The entropy is the minimum of the mean loss over all models of these texts.
"""

from __future__ import annotations

import bisect
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
    """One replacement of a symbol.

    `text` is plain text with slots: `{animal}` draws the symbol `animal`; `{friend=animal}` also
    stores the draw as `friend`; `{friend}` repeats the stored text; `{friend.habit}` inserts the
    stored draw's feature `habit`. Features are named texts, which may contain slots, too.
    """

    text: str
    weight: float = 1.0  # its frequency, relative to the symbol's other alternatives
    features: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Draw:
    """A slot that draws an alternative of `symbol` and stores it as `name`, if given."""

    symbol: str
    name: str | None = None


@dataclass(frozen=True)
class Recall:
    """A slot that inserts a feature of the draw stored as `name` (`text`: its text)."""

    name: str
    feature: str = "text"


Part = str | Draw | Recall
Parts = tuple[Part, ...]
Memory = Mapping[str, Alternative]


class Grammar:
    """A finite, unambiguous, probabilistic grammar with stored draws.

    `rules` holds the alternatives of each symbol; a plain string has weight 1 and no features.
    `start` is the symbol of a whole text.

    Raises:
        ValueError: invalid rules; the message names the rule and the reason.
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
                raise ValueError(f"the symbol {symbol!r} needs alternatives with weights above 0")
            total = math.fsum(one.weight for one in alternatives)
            self._probabilities[symbol] = [one.weight / total for one in alternatives]
            self._cumulative[symbol] = list(itertools.accumulate(self._probabilities[symbol]))
        every = itertools.chain.from_iterable(self.rules.values())
        texts = {text for one in every for text in (one.text, *one.features.values())}
        self._parts = {text: self._split(text) for text in ("", *texts)}

    def sample(self, generator: random.Random) -> str:
        """Generate a random text."""
        pending: list[Part] = [Draw(self.start)]
        memory: dict[str, Alternative] = {}
        written: list[str] = []
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
        """Yield every text with its probability. Only for small grammars."""
        return self._derivations((Draw(self.start),), {}, None)

    def log_probability(self, text: str) -> float:
        """Return the log-probability of `text` in nats; -inf if the grammar cannot generate it.

        Raises:
            ValueError: `text` has two derivations: the grammar is ambiguous.
        """
        derivations = self._derivations((Draw(self.start),), {}, text)
        found = [math.log(probability) for _, probability in itertools.islice(derivations, 2)]
        if len(found) > 1:
            raise ValueError(f"the grammar is ambiguous: this text has two derivations: {text!r}")
        return found[0] if found else -math.inf

    def _derivations(
        self, parts: Parts, memory: Memory, wanted: str | None
    ) -> Iterator[tuple[str, float]]:
        """Yield the texts of `parts` with their probabilities: all, or only the one `wanted`."""
        if not parts:
            if not wanted:
                yield "", 1.0
        elif isinstance(literal := parts[0], str):
            if wanted is None or wanted.startswith(literal):
                rest = None if wanted is None else wanted[len(literal) :]
                for text, probability in self._derivations(parts[1:], memory, rest):
                    yield literal + text, probability
        else:
            for first, after, then in self._expansions(parts, memory):
                for text, probability in self._derivations(after, then, wanted):
                    yield text, first * probability

    def count(self) -> int:
        """Return the number of different texts, exactly."""
        return self._size[0]

    def entropy(self) -> float:
        """Return the entropy of a text in nats: the minimum of the mean loss of any model."""
        return self._size[1]

    @cached_property
    def _size(self) -> tuple[int, float]:
        """The number of texts and the entropy of one in nats, by the chain rule.

        Later draws depend only on the open slots and on stored features that contain draws. So
        memoization turns a sum over all texts into one that is hardly longer than the grammar.
        """

        @cache
        def measure(slots: Parts, memory: tuple[tuple[str, Alternative], ...]) -> tuple[int, float]:
            if not slots:
                return 1, 0.0
            count, entropy = 0, 0.0
            for probability, after, then in self._expansions(slots, dict(memory)):
                open_slots = tuple(part for part in after if not isinstance(part, str))
                open_memory = tuple((name, _only_draws(one)) for name, one in sorted(then.items()))
                rest_count, rest_entropy = measure(open_slots, open_memory)
                count += rest_count
                entropy += probability * (rest_entropy - math.log(probability))
            return count, entropy

        return measure((Draw(self.start),), ())

    def _expansions(self, parts: Parts, memory: Memory) -> Iterator[tuple[float, Parts, Memory]]:
        """Yield every replacement of the slot `parts[0]`: probability, parts and memory after."""
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

    def _split(self, text: str) -> Parts:
        """Cut a text at its slots: `"{hero=name} ran"` becomes `(Draw("name", "hero"), " ran")`."""
        parts: list[Part] = []
        position = 0
        for match in SLOT.finditer(text):
            parts += [text[position : match.start()]] if match.start() > position else []
            stored_as, symbol, feature = match.groups()
            if stored_as or (symbol in self.rules and not feature):
                if symbol not in self.rules:
                    raise ValueError(f"no symbol {symbol!r} for {match.group()} in {text!r}")
                parts.append(Draw(symbol, stored_as))
            else:
                parts.append(Recall(symbol, feature or "text"))
            position = match.end()
        return (*parts, *([text[position:]] if position < len(text) else []))


def _only_draws(alternative: Alternative) -> Alternative:
    """Return a stored draw without its fixed texts: only texts that draw affect the entropy."""
    text, *features = (
        text if "{" in text else "" for text in (alternative.text, *alternative.features.values())
    )
    return Alternative(text, features=dict(zip(alternative.features, features, strict=True)))
