"""Where the numbers of a matrix lie in memory, for a model that only generates."""

from __future__ import annotations

import torch
from torch import nn

from horovod_lm.models.transformer_lm import TransformerLM


def store_by_column(model: TransformerLM) -> TransformerLM:
    """Lay the model's matrices out by column; shapes, values and names stay as they are.

    With its cache, a model that generates multiplies every matrix (outputs, inputs) by one vector.
    On a CPU that takes as long as reading the matrix, and the libraries read it faster when
    the numbers that meet the same input lie side by side. Only for generation: in training,
    gradients and optimizer states would take on the layout of their parameter.

    Args:
        model: changed in place.

    Returns:
        The same model.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or module is model.token_embedding:
                module.weight.data = module.weight.t().contiguous().t()
    return model
