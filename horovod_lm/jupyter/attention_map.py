"""Where every head of a model looks while it reads a text: plain numbers, no widget.

attention = read_attention(model, tokenizer, "Tom lost his red kite.")
attention.weights[0, 1]        # layer 1, head 2: (T, T), a row for each token that looks
attention.entropy_bits[0, 1]   # how widely that head spreads its look, on average
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from horovod_lm.jupyter.visible import visible_token
from horovod_lm.utils.errors import DataError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM


@dataclass(frozen=True)
class AttentionMap:
    """What all heads do with one text.

    Attributes:
        tokens: the T tokens as `visible` text, end-of-text first, as in training.
        weights: (L, H, T, T) for L layers of H heads; each row sums to 1.
    """

    tokens: list[str]
    weights: Tensor

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.weights.shape[0]

    @property
    def n_heads(self) -> int:
        """Heads of each layer."""
        return self.weights.shape[1]

    @property
    def entropy_bits(self) -> Tensor:
        """(L, H): entropy of a head's rows in bits, their mean; 0: each looks at one token only."""
        return entropy_of_rows(self.weights).mean(dim=-1)

    def __repr__(self) -> str:
        layers = f"{self.n_layers} layer{'s' if self.n_layers > 1 else ''}"
        return f"attention of {layers} with {self.n_heads} heads over {len(self.tokens)} tokens"


def read_attention(model: TransformerLM, tokenizer: Tokenizer, text: str) -> AttentionMap:
    """Read a text as the beginning of a document and keep where every head looks.

    Args:
        model: any model of this package; it is left in the mode that it was in.
        tokenizer: its tokenizer.
        text: at most the model's context, less one token for end-of-text. Empty: that token alone.

    Raises:
        DataError: the text is longer than the model's context, or cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a character, {text[error.start]!r} at position {error.start}, "
            "which has no UTF-8 form: leave it out"
        ) from None
    ids = [tokenizer.eot_id, *tokenizer.encode(text)]
    if len(ids) > model.max_seq_len:
        raise DataError(
            f"the text has {len(ids)} tokens with end-of-text before it, but the model sees "
            f"{model.max_seq_len} at once: shorten it"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        weights = model.attention_weights(torch.tensor([ids], device=device))[:, 0]
    finally:
        model.train(was_training)
    return AttentionMap([visible_token(tokenizer, one) for one in ids], weights.float().cpu())


def entropy_of_rows(weights: Tensor) -> Tensor:
    """Return the entropy of each row of (..., S) weights in bits: (...)."""
    return torch.special.entr(weights).sum(dim=-1) / math.log(2)


def thumbnails(weights: Tensor, most: int = 32) -> Tensor:
    """Shrink every head's map to at most `most` rows and columns, a byte for each cell.

    A cell of a shrunk map is the largest weight of the cells that it stands for: a single strong
    look stays visible however long the text is.

    Args:
        weights: (L, H, T, T).
        most: rows and columns of the result.

    Returns:
        uint8 (L, H, n, n), n = min(T, most); 255 is a weight of 1.
    """
    size = min(weights.shape[-1], most)
    shrunk = F.adaptive_max_pool2d(weights, size)  # (L, H, T, T) -> (L, H, n, n)
    return (shrunk * 255).round().to(torch.uint8)
