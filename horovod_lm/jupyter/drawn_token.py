"""A token that a model drew, and the distribution that it was drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horovod_lm.jupyter.visible import visible_token
from horovod_lm.models.sampling import filtered_probabilities
from horovod_lm.utils.config import GenerationConfig

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer

SHOWN = 12  # candidates that are kept of each distribution, the likeliest
LEAST_SURPRISING, MOST_SURPRISING = 1.0, 0.001  # probabilities: no colour, the full colour


@dataclass(frozen=True)
class Candidate:
    """A token that might have come, with its probability before and after the filters."""

    token_id: int
    before: float
    after: float


@dataclass(frozen=True)
class Distribution:
    """What a token was drawn from.

    Attributes:
        after: the drawn token's probability after temperature, top-k and top-p.
        rank: 1 if no token was likelier than the drawn one.
        n_kept: tokens that the filters left.
        candidates: the likeliest tokens, and the drawn one where it is not among them.
    """

    after: float
    rank: int
    n_kept: int
    candidates: tuple[Candidate, ...]


class DrawnToken:
    """A token, how likely it was, and what it was drawn from.

    Attributes:
        token_id: its number.
        text: it, as `visible` text.
        before: its probability as the model learned it, before any filter.
    """

    def __init__(
        self,
        token_id: int,
        before: float,
        logits: Tensor,
        how: GenerationConfig,
        tokenizer: Tokenizer,
    ) -> None:
        self.token_id, self.before = token_id, before
        self.tokenizer = tokenizer
        self.text = visible_token(tokenizer, token_id)
        # Until its distribution is worked out: when it is asked for, or when the text is done.
        # While the model writes, the filters' sorting would cost a fifth of its speed.
        self._logits: Tensor | None = logits
        self._how = how
        self._distribution: Distribution | None = None

    @property
    def distribution(self) -> Distribution:
        """What the token was drawn from; the whole vocabulary's logits are let go after this."""
        if self._distribution is None:
            work_out([self])
        return self._distribution

    @property
    def surprise(self) -> float:
        """How unlikely the token was: 0 for certain, 1 for one in a thousand or less."""
        return surprise(self.before)


def surprise(probability: float) -> float:
    """Map a probability to 0 (it was certain) to 1 (one in a thousand or less), by its logarithm.

    In between lies one third for each power of ten: 0.1 is a third, 0.01 two thirds.
    """
    likely = min(max(probability, MOST_SURPRISING), LEAST_SURPRISING)
    return math.log(likely) / math.log(MOST_SURPRISING) + 0.0  # never -0.0


def work_out(tokens: Sequence[DrawnToken]) -> None:
    """Work out the distributions of tokens of one text, together, and let their logits go."""
    tokens = [token for token in tokens if token._logits is not None]
    if not tokens:
        return
    logits = torch.stack([token._logits for token in tokens])  # (N, V)
    ids = torch.tensor([token.token_id for token in tokens], device=logits.device)  # (N,)
    for token, found in zip(tokens, find_distributions(logits, ids, tokens[0]._how), strict=True):
        token._distribution, token._logits = found, None


@torch.inference_mode()
def find_distributions(
    logits: Tensor, token_ids: Tensor, how: GenerationConfig
) -> list[Distribution]:
    """Say what tokens were drawn from.

    Args:
        logits: (N, V), as the model gave them.
        token_ids: (N,) the token that was drawn from each row.
        how: the filters between them.
    """
    before, after = logits.float().softmax(dim=-1), filtered_probabilities(logits.float(), how)
    own = token_ids[:, None]  # (N, 1)
    rank = 1 + (before > before.gather(-1, own)).sum(dim=-1)  # (N,)
    likeliest = before.topk(min(SHOWN, before.shape[-1]), dim=-1).indices
    shown = torch.cat([likeliest, own], dim=-1)  # (N, SHOWN + 1)
    columns = (shown, before.gather(-1, shown), after.gather(-1, shown))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    kept = (after > 0).sum(dim=-1).tolist()
    found = []
    for (ids, *probabilities), place, n_kept in zip(rows, rank.tolist(), kept, strict=True):
        candidates = tuple(map(Candidate, ids, *probabilities))
        after_filters = candidates[-1].after
        if ids[-1] in ids[:-1]:
            candidates = candidates[:-1]
        found.append(Distribution(after_filters, place, n_kept, candidates))
    return found
