"""Attention, twice: written out for reading, and as it runs. And the cache that makes it quick.

Scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1):
every position asks a question (its query), every position offers an answer (its value) and says
what it answers (its key). The result is the average of the values, weighted by how well each key
fits the query.

Shapes, here and in the whole package: B sequences in a batch, T positions that ask, S positions
that are asked (S = T without a cache), H heads, D numbers per head, C = H x D numbers per position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, step by step: softmax(Q K^T / sqrt(D)) V.

    For reading, and for looking at the weights: it holds the whole (T, S) matrix of every head.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        mask: bool, broadcastable to (B, H, T, S); True where a query may look. None: causal.

    Returns:
        The output (B, H, T, D) and the weights (B, H, T, S). The weights of a query sum to 1, or
        are all 0 (never NaN) when it may look nowhere.
    """
    if mask is None:
        mask = allowed_positions(query.shape[-2], key.shape[-2], device=query.device)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, H, T, S)
    # The lowest finite number, not -inf: softmax over nothing but -inf is 0/0.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # (B, H, T, S)
    return weights @ value, weights  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def attention_as_it_runs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The same attention by torch's fused kernels, which never hold the (T, S) matrix.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        mask: as for `attention_written_out`. None lets the kernels skip the future altogether.
        dropout: probability of dropping each weight (0.0 outside training).

    Returns:
        The output (B, H, T, D).
    """
    is_causal = False
    if mask is None and query.shape[-2] > 1:
        is_causal = query.shape[-2] == key.shape[-2]
        if (
            not is_causal
        ):  # new positions after cached ones: torch's own causal mask starts at key 0
            mask = allowed_positions(query.shape[-2], key.shape[-2], device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
    )


def allowed_positions(
    n_queries: int,
    n_keys: int,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Say which position may look at which: never at the future, never at padding.

    The queries are the last `n_queries` of the `n_keys` positions. A position of padding may look
    at itself, so that no softmax is over nothing; nobody else ever looks at it.

    Args:
        n_queries: T.
        n_keys: S, at least T.
        attention_mask: (B, S), 1 or True for a token and 0 or False for padding. None: no padding.
        device: where to build the mask when there is no `attention_mask`.

    Returns:
        bool (B, 1, T, S), or (1, 1, T, S) without padding; True where a query may look.
    """
    device = device if attention_mask is None else attention_mask.device
    keys = torch.arange(n_keys, device=device)  # (S,)
    queries = keys[n_keys - n_queries :, None]  # (T, 1)
    not_future = keys <= queries  # (T, S)
    if attention_mask is None:
        return not_future[None, None]  # (T, S) -> (1, 1, T, S)
    is_token = attention_mask.bool()[:, None, None, :]  # (B, S) -> (B, 1, 1, S)
    return not_future & (is_token | (keys == queries))  # (B, 1, T, S)


class LayerCache:
    """The keys and values that one layer has computed so far, in memory taken once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None  # (B, H, capacity, D), once the first key is seen
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values; return all of them, (B, H, S, D) each, without a copy."""
        if self.keys is None or self.values is None:
            n_sequences, n_heads, _, head_size = key.shape
            self.keys = key.new_empty(n_sequences, n_heads, self.capacity, head_size)
            self.values = torch.empty_like(self.keys)
        start, end = self.length, self.length + key.shape[2]
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KeyValueCache:
    """What every layer remembers of the positions read so far.

    A key or a value never changes when more text follows, because no position looks at the future.
    So each new token costs one position's work instead of the whole sequence's.

    Args:
        n_layers: layers of the model.
        capacity: the most positions it will hold.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return self.layers[0].length if self.layers else 0

    def clear(self) -> None:
        """Forget the positions, keep the memory."""
        for layer in self.layers:
            layer.length = 0


class MultiHeadAttention(nn.Module):
    """Causal self-attention with H heads side by side, as in GPT-2.

    Args:
        d_model: C, numbers per position.
        n_heads: H; must divide `d_model`.
        dropout: probability of dropping an attention weight, in training.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Let every position look at itself and at the positions before it.

        Args:
            x: (B, T, C).
            mask: bool (B, 1, T, S) from `allowed_positions`; None where nothing is padded.
            cache: this layer's keys and values so far; the new ones are appended to it.

        Returns:
            (B, T, C).
        """
        query, key, value = self.project(x)
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        heads = attention_as_it_runs(query, key, value, mask, dropout)
        joined = heads.transpose(1, 2).reshape(x.shape)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return self.output(joined)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of (B, T, C): three times (B, H, T, D)."""
        n_sequences, length, d_model = x.shape
        projected = self.query_key_value(x)  # (B, T, 3C)
        # (B, T, 3C) -> (B, T, 3, H, D)
        split = projected.view(n_sequences, length, 3, self.n_heads, d_model // self.n_heads)
        # (B, T, 3, H, D) -> (3, B, H, T, D): H before T, so that each head is a (T, D) matrix
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Show where each position of (B, T, C) looks: (B, H, T, T), every row sums to 1."""
        return attention_written_out(*self.project(x), mask)[1]
