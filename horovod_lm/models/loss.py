"""Chunked cross-entropy: the loss of a large vocabulary without the full logits matrix.

The last step of a language model multiplies every position's vector (C numbers) by the output
embedding (V rows). With N = 8192 positions and GPT-2's V = 50257, the (N, V) logits take 1.6 GB in
float32, and the usual implementation holds about three such matrices: logits, log-softmax and
gradient.

The loss is a sum over positions, and the gradient of one position's logits is known as soon as the
logits are: softmax(logits) - one_hot(target). So the positions are processed in chunks: compute a
chunk's logits, replace them in place by their gradient, multiply that into the gradients of the
hidden vectors and of the embedding, and free the chunk. The arithmetic is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Targets with this value do not count in the loss: torch's convention."""

MAX_LOGITS_PER_CHUNK = {"cpu": 2**25, "cuda": 2**27}
"""128 MB in float32, 512 MB on a GPU. Each chunk reads the embedding and adds to its gradient."""

VOCABULARY_MULTIPLE = {"cuda": 64}
"""Tensor cores need rows of logits whose length is a multiple of 8, and work in tiles of 64."""


def shift_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Turn labels (B, T) into targets (B, T): the target of position t is the token at t + 1.

    Labels are the tokens of the text itself, or -100 where nothing is to be learned. Padding, 0 in
    `attention_mask` (B, T), is not predicted and does not predict. A position that does not count
    has the target -100; the last one never counts.
    """
    targets = torch.full_like(labels, IGNORE_INDEX, dtype=torch.long)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        is_token = attention_mask.bool()
        targets[:, :-1].masked_fill_(~(is_token[:, 1:] & is_token[:, :-1]), IGNORE_INDEX)
    return targets


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (..., V) and targets (...); 0.0 without targets."""
    total = F.cross_entropy(
        _at_least_float32(logits.flatten(0, -2)),  # (..., V) -> (N, V)
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return total / count_targets(targets)


def chunked_cross_entropy(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Mean cross-entropy of `hidden @ lm_head_weight.T` without holding that matrix.

    Equals `cross_entropy` in value and in both gradients: a scalar in nats, 0.0 if no target
    counts. It can be differentiated once, by one call of `backward`.

    Args:
        hidden: (..., C), the model's last hidden states.
        lm_head_weight: (V, C), the output embedding.
        targets: (...), token ids; -100 where nothing is to be learned.
        chunk_size: positions per chunk; None: so many that a chunk has at most
            `MAX_LOGITS_PER_CHUNK` logits.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (..., C) -> (N, C)
    targets = targets.reshape(-1)  # (...) -> (N,)
    if torch.is_grad_enabled() and (hidden.requires_grad or lm_head_weight.requires_grad):
        total = _SummedCrossEntropy.apply(hidden, lm_head_weight, targets, chunk_size)
    else:
        total = token_losses(hidden, lm_head_weight, targets, chunk_size)[0].sum()
    return total / count_targets(targets)


def count_targets(targets: Tensor) -> Tensor:
    """Count the targets that are not -100, clamped to 1 to avoid division by zero."""
    return (targets != IGNORE_INDEX).sum().clamp(min=1)


@torch.no_grad()
def token_losses(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each position's loss and most likely token, chunk by chunk, without gradients.

    Arguments as for `chunked_cross_entropy`, with `hidden` (N, C) and `targets` (N,).

    Returns:
        Losses (N,) in nats, 0.0 where the target is -100, and the most likely token ids (N,).
    """
    vocab_size = len(lm_head_weight)
    hidden, lm_head_weight = _cast_and_pad(hidden, lm_head_weight)
    losses, predictions = [], []
    for rows in _chunks(hidden, vocab_size, chunk_size):
        logits = _logits(hidden[rows], lm_head_weight, vocab_size)  # (n, C) -> (n, V)
        losses.append(
            F.cross_entropy(logits, targets[rows], ignore_index=IGNORE_INDEX, reduction="none")
        )
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predictions)


def _chunks(hidden: Tensor, vocab_size: int, chunk_size: int | None) -> list[slice]:
    """Cut the rows into slices of equal length; at least one, which may be empty."""
    n_rows = len(hidden)
    if chunk_size is None:
        n_chunks = max(1, -(-n_rows * vocab_size // MAX_LOGITS_PER_CHUNK[hidden.device.type]))
        chunk_size = max(1, -(-n_rows // n_chunks))
    return [slice(start, start + chunk_size) for start in range(0, max(1, n_rows), chunk_size)]


def _cast_and_pad(hidden: Tensor, lm_head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast once: autocast itself would cast the whole embedding for every chunk.

    On a GPU, also add rows of zeros to the embedding, up to a multiple of `VOCABULARY_MULTIPLE`.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
    padding = -len(lm_head_weight) % VOCABULARY_MULTIPLE.get(device, 1)
    return hidden, F.pad(lm_head_weight, (0, 0, 0, padding)) if padding else lm_head_weight


def _logits(hidden: Tensor, padded_weight: Tensor, vocab_size: int) -> Tensor:
    """Multiply (n, C) by (V, C), in float32 or more; padding is given the probability 0."""
    logits = _at_least_float32(F.linear(hidden, padded_weight))
    if len(padded_weight) > vocab_size:
        logits[:, vocab_size:].fill_(-torch.inf)
    return logits


def _at_least_float32(logits: Tensor) -> Tensor:
    """Softmax in half precision cannot distinguish likely tokens."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum of the losses; the forward pass computes both gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, chunk_size: int | None
    ) -> Tensor:
        hidden_gradient = torch.empty_like(hidden)  # (N, C)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        vocab_size, gradient_dtype = len(lm_head_weight), lm_head_weight.dtype
        hidden, lm_head_weight = _cast_and_pad(hidden, lm_head_weight)
        weight_gradient = torch.zeros_like(lm_head_weight, dtype=gradient_dtype)  # (V, C)
        for rows in _chunks(hidden, vocab_size, chunk_size):
            logits = _logits(hidden[rows], lm_head_weight, vocab_size)  # (n, C) -> (n, V)
            chunk_total, gradient = _loss_and_gradient(logits, targets[rows])
            total += chunk_total
            gradient = gradient.to(lm_head_weight.dtype)  # (n, V)
            hidden_gradient[rows] = gradient @ lm_head_weight  # (n, V) @ (V, C) -> (n, C)
            if weight_gradient.dtype == gradient.dtype:  # summed inside the product
                weight_gradient.addmm_(gradient.t(), hidden[rows])  # (V, n) @ (n, C) -> (V, C)
            else:
                weight_gradient += gradient.t() @ hidden[rows]
        ctx.gradients = (hidden_gradient, weight_gradient[:vocab_size])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the first backward() freed the gradients of the chunked loss; "
                "for a second one, compute the loss with return_logits=True"
            )
        # Scaled in place: a copy would have the embedding's size.
        hidden_gradient, weight_gradient = (each.mul_(total_gradient) for each in ctx.gradients)
        ctx.gradients = None
        return hidden_gradient, weight_gradient, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits (n, V), and their gradient in the same memory."""
    ignored = targets == IGNORE_INDEX  # (n,)
    targets = targets.masked_fill(ignored, 0)[:, None]  # (n, 1)
    log_normalizer = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    losses = (log_normalizer - logits.gather(1, targets)).squeeze(1).masked_fill_(ignored, 0.0)
    gradient = logits.sub_(log_normalizer).exp_()  # softmax, (n, V)
    gradient.scatter_add_(1, targets, torch.full_like(log_normalizer, -1.0))
    gradient.masked_fill_(ignored[:, None], 0.0)
    return losses.sum(), gradient
