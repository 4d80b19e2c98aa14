"""From logits to text: temperature, top-k, top-p, and the loop that draws token after token.

Top-k is from Fan, Lewis and Dauphin 2018 (https://arxiv.org/abs/1805.04833), top-p ("nucleus") from
Holtzman et al. 2020 (https://arxiv.org/abs/1904.09751): both cut off the long tail of unlikely
tokens, where a language model is least to be trusted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horovod_lm.models.attention import KeyValueCache
from horovod_lm.models.checks import check_token_ids
from horovod_lm.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from horovod_lm.models.transformer_lm import TransformerLM


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn. Filters apply in this order: temperature, top-k, top-p.

    Raises:
        ConfigError: a value that cannot work.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (all tokens) or above, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is always taken: at 0, and where dividing overflows."""
        return self.temperature < 1e-6


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Set all but the `top_k` largest logits (..., V) to -inf, so that they are never drawn."""
    largest, token_ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, token_ids, largest)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens of (..., V) that together reach probability `top_p`; rest to -inf.

    The token that crosses the line is kept, so at least one always is.
    """
    largest_first, token_ids = logits.sort(dim=-1, descending=True)
    probabilities = largest_first.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # probability of all likelier tokens
    largest_first = largest_first.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(logits).scatter(-1, token_ids, largest_first)


def filtered_probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Say how likely each token is drawn: (..., V) logits -> (..., V) probabilities."""
    if settings.greedy:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    return logits.softmax(dim=-1)


def draw(logits: Tensor, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """Draw one token per row: (B, V) logits -> (B,) token ids, as `filtered_probabilities` says.

    The same filters in fewer steps: once the largest logits stand in order, both are cuts.
    """
    if settings.greedy:
        return logits.argmax(dim=-1)
    logits, token_ids, vocab_size = logits.float(), None, logits.shape[-1]
    top_k, top_p = settings.top_k or vocab_size, settings.top_p or 1.0
    if top_k < vocab_size or top_p < 1.0:
        logits, token_ids = logits.topk(min(top_k, vocab_size), dim=-1)  # (B, V) -> (B, k)
    probabilities = (logits / settings.temperature).softmax(dim=-1)
    if top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities.masked_fill_(before >= top_p, 0.0)
    # A race: token i arrives after a random time that is exponential with rate p_i. The first to
    # arrive is i with probability p_i / sum(p), so nothing needs to be normalised again.
    arrivals = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
    first = arrivals.argmin(dim=-1, keepdim=True)  # (B, 1)
    return (first if token_ids is None else token_ids.gather(-1, first)).squeeze(-1)


def make_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """Make a random generator of one's own: the same for the same seed, a new one without."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)  # any whole number will do
    return generator


@torch.inference_mode()
def decode(
    model: TransformerLM,
    input_ids: Tensor,
    max_new_tokens: int,
    settings: SamplingSettings,
    eos_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator,
    use_cache: bool = True,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Draw token after token for every row, and yield each step's tokens as soon as they are drawn.

    A prompt longer than the model's context is cut on the left, with a warning. When a row has
    filled the context, it goes on from the newer half of it: positions are learned, so what is kept
    must be read again at its new positions, and keeping half makes that rare. Every row does so by
    itself: what it says does not depend on how it was padded.

    Args:
        model: the model; dropout is off while this runs.
        input_ids: (B, T) prompts, T >= 1.
        max_new_tokens: the most steps.
        settings: how to draw.
        eos_token_id: a row that draws this has ended; None: none ends early.
        attention_mask: (B, T), zeros (padding), then ones; None: no padding.
        generator: draws the random numbers.
        use_cache: False reads the whole row again for each token.
        watch: is given the logits (B, V) that each step's tokens are drawn from.

    Yields:
        (B,) token ids; the padding token for rows that have ended. Stops when all have.

    Raises:
        DataError: prompts that are empty, not padded on the left, or of another vocabulary.
    """
    context = _Context(model, input_ids, attention_mask, max_new_tokens, use_cache)
    filler = model.pad_token_id
    if filler is None or not 0 <= filler < model.vocab_size:
        filler = eos_token_id
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = context.next_logits()  # (B, V)
            if watch is not None:
                watch(logits)
            tokens = draw(logits, settings, generator)  # (B, V) -> (B,)
            if eos_token_id is not None:
                tokens = tokens.masked_fill(ended, filler)
                ended |= tokens == eos_token_id
            context.append(tokens)
            yield tokens
            if eos_token_id is not None and ended.all():
                return
    finally:
        model.train(was_training)


class _Context:
    """The part of every row that the model sees, and what it remembers of it."""

    def __init__(
        self,
        model: TransformerLM,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        use_cache: bool,
    ) -> None:
        starts = _prompt_starts(input_ids, attention_mask, model)
        n_sequences, self.end = input_ids.shape
        self.model = model
        self.ids = input_ids.new_zeros(n_sequences, self.end + max_new_tokens)  # (B, T + new)
        self.ids[:, : self.end] = input_ids
        self.starts = [max(start, self.end - model.max_seq_len) for start in starts]
        if self.starts != starts:
            warnings.warn(
                f"the prompt has {self.end - min(starts, default=0)} tokens, but the model sees "
                f"{model.max_seq_len} at once: only its end is used",
                stacklevel=4,
            )
        capacity = min(model.max_seq_len, self.ids.shape[1])
        self.cache = KeyValueCache(len(model.blocks), capacity) if use_cache else None
        self.visible: Tensor | None = None  # (B, capacity): which columns are no padding
        self.unread = 0  # columns from the end that the cache has not seen; 0: read everything

    def next_logits(self) -> Tensor:
        """Read what is new and score every token that might follow: (B, V)."""
        first = min(self.starts, default=0)
        if self.cache is None or self.unread == 0:
            self._find_padding(first)
            if self.cache is not None:
                self.cache.clear()
            self.unread = self.end - first
        mask = None if self.visible is None else self.visible[:, : self.end - first]
        new = self.ids[:, self.end - self.unread : self.end]  # (B, unread)
        hidden = self.model.hidden_states(new, mask, self.cache)  # (B, unread, C)
        return self.model.logits(hidden[:, -1])  # (B, C) -> (B, V)

    def append(self, tokens: Tensor) -> None:
        """Add one token (B,) to every row; rows that are full go on from their newer half."""
        self.ids[:, self.end] = tokens
        self.end += 1
        self.unread = 1
        longest = self.model.max_seq_len
        if self.end - min(self.starts, default=0) > longest:
            newer_half = self.end - max(1, longest // 2)
            self.starts = [
                newer_half if self.end - start > longest else start for start in self.starts
            ]
            self.unread = 0

    def _find_padding(self, first: int) -> None:
        if max(self.starts, default=0) == first:
            self.visible = None
            return
        capacity = self.model.max_seq_len
        columns = torch.arange(first, first + capacity, device=self.ids.device)  # (capacity,)
        starts = torch.tensor(self.starts, device=self.ids.device)[:, None]  # (B, 1)
        self.visible = columns >= starts  # (B, capacity)


def _prompt_starts(
    input_ids: Tensor, attention_mask: Tensor | None, model: TransformerLM
) -> list[int]:
    """Find the column where each prompt begins, after the padding on its left."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
        raise DataError(
            "generate() continues token ids of shape (batch, length) with at least one token each, "
            f"got {input_ids.dtype} of shape {tuple(input_ids.shape)}; begin with the "
            "end-of-text token where there is no prompt"
        )
    check_token_ids("the prompt", input_ids.cpu(), model.vocab_size)
    if attention_mask is None:
        return [0] * len(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids "
            f"{tuple(input_ids.shape)}"
        )
    is_token = attention_mask.bool()
    if not is_token[:, -1].all() or (is_token[:, :-1] & ~is_token[:, 1:]).any():
        raise DataError(
            "generate() needs shorter prompts padded on the left: each row of attention_mask must "
            "be zeros, then ones, and end with a one"
        )
    return (~is_token).sum(dim=1).tolist()
