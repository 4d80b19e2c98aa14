"""Multi-head causal self-attention and the key-value cache.

Scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1)
is here twice: `naive_attention` computes every step and returns the attention weights,
`sdpa_attention` calls torch's fused kernels. A test holds them equal.

Shapes, here and in the whole package: B sequences in a batch, T query positions, S key positions
(S = T without a cache), H heads, D numbers per head, C = H x D numbers per position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_LENGTH_OF_PRODUCTS = 512
"""Beyond it, torch's fused kernel is as fast in bfloat16 on a CPU, and needs less memory."""


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax(Q K^T / sqrt(D)) V step by step and return the attention weights too.

    Holds the (T, S) matrix of every head: for reading and for inspecting weights.

    Args:
        query: (B, H, T, D).
        key, value: (B, H, S, D).
        mask: bool, broadcastable to (B, H, T, S); True where a query may attend. None: causal.

    Returns:
        The output (B, H, T, D) and the weights (B, H, T, S). The weights of a query sum to 1; the
        weights of a fully masked query are 0, not NaN.
    """
    if mask is None:
        mask = causal_mask(query.shape[-2], key.shape[-2], device=query.device)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, H, T, S)
    # The lowest finite number instead of -inf: the softmax of a row of -inf is NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # (B, H, T, S)
    return weights @ value, weights  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute attention with torch's fused kernels, which never hold the (T, S) matrix.

    Shapes as for `naive_attention`; returns the output only. `mask=None` lets the kernels skip the
    masked half. `dropout` is the probability of dropping an attention weight. Short sequences in
    bfloat16 on a CPU are computed by matrix products instead.
    """
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    is_causal = mask is None and n_queries > 1 and n_queries == n_keys
    on_cpu_in_bfloat16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if is_causal and on_cpu_in_bfloat16 and n_keys <= MAX_LENGTH_OF_PRODUCTS:
        return _attention_by_products(query, key, value, dropout)
    if mask is None and 1 < n_queries < n_keys:
        # New positions after cached ones: the kernels' own causal mask starts at key 0.
        mask = causal_mask(n_queries, n_keys, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
    )


def _attention_by_products(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Compute causal attention of (B, H, T, D) by two matrix products; holds the (T, T) weights.

    torch's fused CPU kernel computes bfloat16 products in float32: a forward and backward pass
    takes two to three times as long as this.
    """
    n_sequences, n_heads, length, head_size = query.shape
    query, key, value = (part.flatten(0, 1) for part in (query, key, value))  # (B H, T, D)
    # Added to the scores: 0 where a query may attend, -inf in its future.
    future = torch.full((length, length), -math.inf, dtype=query.dtype).triu(1)  # (T, T)
    scores = torch.baddbmm(
        future.expand(len(query), length, length), query, key.mT, alpha=1 / math.sqrt(head_size)
    )  # (B H, T, D) @ (B H, D, T) -> (B H, T, T)
    weights = scores.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights @ value).unflatten(0, (n_sequences, n_heads))  # (B H, T, D) -> (B, H, T, D)


def causal_mask(
    n_queries: int,
    n_keys: int,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build the mask that hides future positions and padding.

    The queries are the last T = `n_queries` of the S = `n_keys` positions. A padding position may
    attend to itself, so that no row is fully masked; no other position attends to it.

    Args:
        attention_mask: (B, S), 1 for a token and 0 for padding; None: no padding, and the mask is
            built on `device`.

    Returns:
        bool (B, 1, T, S), or (1, 1, T, S) without padding; True where a query may attend.
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
    """The keys and values of one layer, in a preallocated buffer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None  # (B, H, capacity, D), allocated by the first append
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return views of all stored ones, (B, H, S, D) each."""
        if self.keys is None or self.values is None:
            n_sequences, n_heads, _, head_size = key.shape
            self.keys = key.new_empty(n_sequences, n_heads, self.capacity, head_size)
            self.values = torch.empty_like(self.keys)
        start, end = self.length, self.length + key.shape[2]
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The keys and values of every layer for the positions processed so far.

    With a causal mask, keys and values do not change when tokens are appended, so each new token
    costs one position's work instead of the whole sequence's. `capacity` is the maximum number of
    positions.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Number of cached positions, padding included."""
        return self.layers[0].length

    def clear(self) -> None:
        """Remove all positions and keep the buffers."""
        for layer in self.layers:
            layer.length = 0


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention, as in GPT-2.

    Args:
        d_model: C, numbers per position.
        n_heads: H; must divide `d_model`.
        dropout: probability of dropping an attention weight, in training.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Attend from each position to itself and to earlier ones: (B, T, C) -> (B, T, C).

        `mask` is bool (B, 1, T, S) from `causal_mask`, or None without padding. `cache` holds this
        layer's keys and values so far; the new ones are appended.
        """
        query, key, value = self.project(x)
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        heads = sdpa_attention(query, key, value, mask, dropout)
        joined = heads.transpose(1, 2).reshape(x.shape)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return self.out_proj(joined)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of (B, T, C): three times (B, H, T, D)."""
        n_sequences, length, d_model = x.shape
        projected = self.qkv_proj(x)  # (B, T, 3C)
        # (B, T, 3C) -> (B, T, 3, H, D)
        split = projected.view(n_sequences, length, 3, self.n_heads, d_model // self.n_heads)
        # (B, T, 3, H, D) -> (3, B, H, T, D): H before T, so that each head is a (T, D) matrix
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention weights (B, H, T, T) of x (B, T, C); every row sums to 1."""
        return naive_attention(*self.project(x), mask)[1]
