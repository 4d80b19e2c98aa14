"""Cross-entropy in pieces: the loss of a large vocabulary without its largest matrix.

The last step of a language model multiplies every position's vector (C numbers) by the whole
vocabulary (V rows) and compares the result with the token that really came next. With N = 8192
positions and GPT-2's 50257 tokens that (N, V) matrix alone is 1.6 GB in float32, and the textbook
way holds about three of them at once: logits, their log-softmax, their gradient.

But the loss is a sum over positions, and the gradient of one position's logits is known as soon as
the logits are: softmax(logits) - one_hot(target). So we take the positions piece by piece: compute
a piece's logits, turn them in place into their gradient, multiply that back into the gradients of
the vectors and of the vocabulary, and let the piece go. The arithmetic is the same,
the memory is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Targets with this value are no part of the loss: torch's convention."""

ELEMENTS_PER_PIECE = 2**25
"""Logits held at once: 128 MB in float32. Much smaller pieces read the vocabulary too often."""


def shift_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Turn labels into targets: position t is asked for the token at t + 1.

    Args:
        labels: (B, T), the tokens of the text itself; -100 where there is nothing to learn.
        attention_mask: (B, T), 1 for a token, 0 for padding. Neither is padding predicted, nor
            is anything predicted from it.

    Returns:
        (B, T) targets, -100 where a position is no part of the loss; the last position never is.
    """
    targets = torch.full_like(labels, IGNORE_INDEX, dtype=torch.long)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        is_token = attention_mask.bool()
        targets[:, :-1].masked_fill_(~(is_token[:, 1:] & is_token[:, :-1]), IGNORE_INDEX)
    return targets


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., V) and targets (...), in nats; 0.0 if nothing is asked."""
    total = F.cross_entropy(
        _float(logits.flatten(0, -2)),  # (..., V) -> (N, V)
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return total / count_targets(targets)


def cross_entropy_in_pieces(
    hidden: Tensor,
    vocabulary: Tensor,
    targets: Tensor,
    elements_per_piece: int = ELEMENTS_PER_PIECE,
) -> Tensor:
    """Mean cross-entropy of `hidden @ vocabulary.T`, never holding that matrix as a whole.

    Equal to `cross_entropy` in value and in both gradients, and as fast. It can be differentiated
    once, by one call of `backward`.

    Args:
        hidden: (..., C), the vectors that the model ends with.
        vocabulary: (V, C), the output embedding.
        targets: (...), token ids; -100 where there is nothing to learn.
        elements_per_piece: logits to hold at once.

    Returns:
        The mean over all targets that are not -100, in nats: a scalar; 0.0 when there are none.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (..., C) -> (N, C)
    targets = targets.reshape(-1)  # (...) -> (N,)
    if torch.is_grad_enabled() and (hidden.requires_grad or vocabulary.requires_grad):
        total = _SummedCrossEntropy.apply(hidden, vocabulary, targets, elements_per_piece)
    else:
        total = token_losses(hidden, vocabulary, targets, elements_per_piece)[0].sum()
    return total / count_targets(targets)


def count_targets(targets: Tensor) -> Tensor:
    """Count the targets that are part of the loss; at least 1, so that it may divide."""
    return (targets != IGNORE_INDEX).sum().clamp(min=1)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    vocabulary: Tensor,
    targets: Tensor,
    elements_per_piece: int = ELEMENTS_PER_PIECE,
) -> tuple[Tensor, Tensor]:
    """Give each position's own loss and best guess, piece by piece, without gradients.

    Args:
        hidden: (N, C).
        vocabulary: (V, C).
        targets: (N,) token ids; -100 where nothing is asked.
        elements_per_piece: logits to hold at once.

    Returns:
        Losses (N,) in nats, 0.0 where nothing is asked, and the likeliest token ids (N,).
    """
    hidden, vocabulary = _as_autocast_would(hidden, vocabulary)
    losses, guesses = [], []
    for rows in _pieces(len(hidden), len(vocabulary), elements_per_piece):
        logits = _float(F.linear(hidden[rows], vocabulary))  # (n, C) @ (C, V) -> (n, V)
        losses.append(
            F.cross_entropy(logits, targets[rows], ignore_index=IGNORE_INDEX, reduction="none")
        )
        guesses.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(guesses)


def _pieces(n_rows: int, vocab_size: int, elements_per_piece: int) -> list[slice]:
    """Cut `n_rows` into equal slices whose logits fit the budget; at least one, perhaps empty."""
    n_pieces = max(1, -(-n_rows * vocab_size // elements_per_piece))
    rows_per_piece = max(1, -(-n_rows // n_pieces))
    return [
        slice(start, start + rows_per_piece) for start in range(0, max(1, n_rows), rows_per_piece)
    ]


def _as_autocast_would(hidden: Tensor, vocabulary: Tensor) -> tuple[Tensor, Tensor]:
    """Cast once for all pieces: autocast itself would cast the vocabulary for each of them."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), vocabulary.to(dtype)
    return hidden, vocabulary


def _float(logits: Tensor) -> Tensor:
    """Softmax needs float32 at least: half precision cannot tell likely tokens apart."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum of the losses; both gradients are computed in the forward pass, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor, elements_per_piece: int
    ) -> Tensor:
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        vocabulary_gradient = torch.zeros_like(vocabulary) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        hidden, vocabulary = _as_autocast_would(hidden, vocabulary)
        for rows in _pieces(len(hidden), len(vocabulary), elements_per_piece):
            logits = F.linear(hidden[rows], vocabulary)  # (n, C) @ (C, V) -> (n, V)
            piece_total, gradient = _loss_and_gradient(_float(logits), targets[rows])
            total += piece_total
            gradient = gradient.to(vocabulary.dtype)  # (n, V)
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ vocabulary  # (n, V) @ (V, C) -> (n, C)
            if vocabulary_gradient is not None:
                _add_product(vocabulary_gradient, gradient, hidden[rows])
        ctx.gradients = (hidden_gradient, vocabulary_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, total_gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss in pieces gave its gradients away in the first backward(); "
                "for a second one, compute the loss with return_logits=True"
            )
        hidden_gradient, vocabulary_gradient = ctx.gradients
        ctx.gradients = None  # scaled in place below: a copy would be the size of the vocabulary
        for gradient in (hidden_gradient, vocabulary_gradient):
            if gradient is not None:
                gradient.mul_(total_gradient)
        return hidden_gradient, vocabulary_gradient, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits (n, V), and their gradient in the memory they held."""
    ignored = targets == IGNORE_INDEX  # (n,)
    targets = targets.masked_fill(ignored, 0)[:, None]  # (n, 1)
    log_normaliser = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    losses = (log_normaliser - logits.gather(1, targets)).squeeze(1).masked_fill_(ignored, 0.0)
    gradient = logits.sub_(log_normaliser).exp_()  # softmax, (n, V)
    gradient.scatter_add_(1, targets, torch.full_like(log_normaliser, -1.0))
    gradient.masked_fill_(ignored[:, None], 0.0)
    return losses.sum(), gradient


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient (n, V) transposed times hidden (n, C) to the vocabulary's gradient (V, C)."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)  # (V, n) @ (n, C), summed inside the product
    else:
        total += gradient.t() @ hidden
