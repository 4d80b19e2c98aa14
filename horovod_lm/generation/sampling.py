"""Sampling: temperature, top-k, top-p, and the loop that generates token after token.

Top-k is from Fan, Lewis and Dauphin 2018 (https://arxiv.org/abs/1805.04833), top-p ("nucleus") from
Holtzman et al. 2020 (https://arxiv.org/abs/1904.09751). Both remove the tail of unlikely tokens,
whose probabilities a language model estimates worst.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horovod_lm.models.attention import KVCache
from horovod_lm.utils.config import GenerationConfig, config_from_dict
from horovod_lm.utils.errors import DataError

if TYPE_CHECKING:
    from horovod_lm.models.transformer_lm import TransformerLM

GREEDY_BELOW = 1e-6  # smaller temperatures would overflow the division


def generation_config(
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.9,
    num_samples: int = 1,
    seed: int | None = None,
) -> GenerationConfig:
    """Return validated settings; `top_k` and `top_p` may be None, which keeps all tokens.

    Raises:
        ConfigError: an invalid value.
    """
    settings = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p, "num_samples": num_samples, "seed": seed,
    }  # fmt: skip
    return config_from_dict({"generation": settings}, name="invalid settings").generation


def filtered_probabilities(logits: Tensor, settings: GenerationConfig) -> Tensor:
    """Apply temperature, top-k and top-p, in this order: (..., V) logits -> probabilities."""
    weights, token_ids = _filter(logits, settings)
    weights /= weights.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, token_ids, weights.to(logits.dtype))


def sample(logits: Tensor, settings: GenerationConfig, generator: torch.Generator) -> Tensor:
    """Sample one token per row from `filtered_probabilities`: (B, V) logits -> (B,) token ids."""
    weights, token_ids = _filter(logits, settings)
    # The exponential trick: of independent exponential times with rates p_i, the smallest belongs
    # to i with probability p_i / sum(p), so the probabilities need no renormalization.
    times = torch.empty_like(weights).exponential_(generator=generator) / weights
    first = times.argmin(dim=-1, keepdim=True)  # (B, 1)
    return token_ids.gather(-1, first).squeeze(-1)


def _filter(logits: Tensor, settings: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Apply temperature, top-k and top-p to logits (..., V) with at most one sort.

    Returns unnormalized probabilities (..., k), 0 where top-p removed a token, and token ids
    (..., k). The token that reaches `top_p` is kept, so at least one token is.
    """
    logits, vocab_size = logits.float(), logits.shape[-1]
    if settings.temperature < GREEDY_BELOW:
        token_ids = logits.argmax(dim=-1, keepdim=True)  # (..., 1)
        return torch.ones_like(token_ids, dtype=logits.dtype), token_ids
    top_k = min(settings.top_k or vocab_size, vocab_size)
    if top_k < vocab_size or settings.top_p < 1.0:
        logits, token_ids = logits.topk(top_k, dim=-1)  # (..., V) -> (..., k), in descending order
    else:
        token_ids = torch.arange(vocab_size, device=logits.device).expand_as(logits)
    weights = (logits / settings.temperature).softmax(dim=-1)
    if settings.top_p < 1.0:
        before = weights.cumsum(dim=-1) - weights  # probability of all more likely tokens
        weights.masked_fill_(before >= settings.top_p, 0.0)
    return weights, token_ids


def make_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """Return a random generator with a seed (any integer), or with a new one for None."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


@torch.inference_mode()
def generate_tokens(
    model: TransformerLM,
    input_ids: Tensor,
    settings: GenerationConfig,
    eos_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator,
    use_cache: bool = True,
    on_logits: Callable[[Tensor], None] | None = None,
) -> Generator[Tensor, None, None]:
    """Generate token by token for every row, and yield the tokens of each step at once.

    A prompt longer than the model's context is truncated on the left, with a warning. A row that
    fills the context continues from its newer half: position embeddings are absolute, so the kept
    tokens are processed again at their new positions, and keeping half makes that rare. A row's
    text does not depend on its padding. Dropout is off during generation.

    Arguments as for `TransformerLM.generate`. `on_logits` is called with the logits (B, V) that
    each step samples from.

    Yields:
        (B,) token ids; the padding token for ended rows. Stops when all rows have ended.

    Raises:
        DataError: prompts that are empty, not padded on the left, or outside the vocabulary.
    """
    context = _Context(model, input_ids, attention_mask, settings.max_new_tokens, use_cache)
    filler = eos_token_id or 0
    if model.pad_token_id is not None and 0 <= model.pad_token_id < model.vocab_size:
        filler = model.pad_token_id
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(settings.max_new_tokens):
            logits = context.next_logits()  # (B, V)
            if on_logits is not None:
                on_logits(logits)
            tokens = sample(logits, settings, generator)  # (B, V) -> (B,)
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
    """The tokens of every row, the part of them in the model's context, and the cache."""

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
                f"the prompt has {self.end - min(starts)} tokens, more than the model's "
                f"context of {model.max_seq_len}: only its end is used",
                stacklevel=4,
            )
        capacity = min(model.max_seq_len, self.ids.shape[1])
        self.cache = KVCache(len(model.blocks), capacity) if use_cache else None
        self.is_token: Tensor | None = None  # (B, max_seq_len), False for padding; None: no padding
        self.unread = 0  # columns at the end that are not in the cache; 0: process everything

    def next_logits(self) -> Tensor:
        """Process the new tokens and return the logits of the next one: (B, V)."""
        first = min(self.starts, default=0)
        if self.cache is None or self.unread == 0:
            starts = self.ids.new_tensor(self.starts)[:, None]  # (B, 1)
            columns = torch.arange(first, first + self.model.max_seq_len, device=starts.device)
            self.is_token = columns >= starts if max(self.starts, default=0) > first else None
            if self.cache is not None:
                self.cache.clear()
            self.unread = self.end - first
        mask = None if self.is_token is None else self.is_token[:, : self.end - first]
        new = self.ids[:, self.end - self.unread : self.end]  # (B, unread)
        hidden = self.model.hidden_states(new, mask, self.cache)  # (B, unread, C)
        return self.model.logits(hidden[:, -1])  # (B, C) -> (B, V)

    def append(self, tokens: Tensor) -> None:
        """Add one token (B,) to every row; full rows continue from their newer half."""
        self.ids[:, self.end] = tokens
        self.end += 1
        self.unread = 1
        longest = self.model.max_seq_len
        if self.end - min(self.starts, default=0) > longest:
            half = self.end - max(1, longest // 2)
            self.starts = [half if self.end - start > longest else start for start in self.starts]
            self.unread = 0


def _prompt_starts(
    input_ids: Tensor, attention_mask: Tensor | None, model: TransformerLM
) -> list[int]:
    """Return the column of each prompt's first token, after the padding on its left."""
    model.check_inputs(input_ids.cpu(), attention_mask)
    if input_ids.shape[1] == 0:
        raise DataError("the prompt is empty: start with the end-of-text token")
    if attention_mask is None:
        return [0] * len(input_ids)
    is_token = attention_mask.bool()
    if not is_token[:, -1].all() or (is_token[:, :-1] & ~is_token[:, 1:]).any():
        raise DataError(
            "generate() needs shorter prompts padded on the left: each row of attention_mask must "
            "be zeros, then ones, and end with a one"
        )
    return (~is_token).sum(dim=1).tolist()
