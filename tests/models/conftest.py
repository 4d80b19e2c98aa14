"""Small models for the tests of this folder."""

from __future__ import annotations

import pytest
import torch

from horovod_lm.models.transformer_lm import TransformerLM

TINY = {
    "vocab_size": 50,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "d_ff": 64,
    "max_seq_len": 16,
    "dropout": 0.0,
    "pad_token_id": 0,
}


@pytest.fixture
def make_model():
    """Build a tiny model whose weights follow from `seed`; any setting can be changed."""

    def make(seed: int = 0, scale: float = 4.0, **changes) -> TransformerLM:
        torch.manual_seed(seed)
        model = TransformerLM(**(TINY | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than GPT-2's start: so that attention is not uniform and no two
                # logits nearly tie, and a wrong mask or position shows in every number.
                parameter.add_(torch.randn_like(parameter) * 0.02 * scale)
        return model

    return make


@pytest.fixture
def left_padded():
    """Three prompts of 7, 4 and 1 tokens, padded on the left to (3, 7), with their mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 50, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
    return ids * mask, mask
