"""What a model is given, checked: each mistake is one sentence, said where it was made."""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_lm.models.loss import IGNORE_INDEX
from horovod_lm.utils.errors import ConfigError, DataError


def check_sizes(
    vocab_size: int,
    d_model: int,
    n_heads: int,
    n_layers: int,
    d_ff: int,
    max_seq_len: int,
    dropout: float,
) -> None:
    """Raise ConfigError unless a model of these sizes can be built."""
    sizes = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "d_ff": d_ff,
        "max_seq_len": max_seq_len,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}")
    if d_model % n_heads:
        raise ConfigError(
            f"d_model = {d_model} cannot be shared out to n_heads = {n_heads}: "
            "choose a d_model that is a multiple of n_heads"
        )
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    *,
    vocab_size: int,
    max_seq_len: int,
    n_cached: int = 0,
) -> None:
    """Raise DataError unless (B, T) `input_ids` and what comes with them fit the model."""
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise DataError(
            "input_ids must be whole numbers of shape (batch, length), got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    n_sequences, length = input_ids.shape
    if n_cached + length > max_seq_len:
        raise DataError(
            f"{n_cached + length} tokens are more than this model can see at once (max_seq_len = "
            f"{max_seq_len}): give it fewer, or build it with a larger max_seq_len"
        )
    _check_shape("attention_mask", attention_mask, (n_sequences, n_cached + length))
    _check_shape("labels", labels, (n_sequences, length))
    check_token_ids("input_ids", input_ids, vocab_size)
    if labels is not None:
        check_token_ids("labels", labels, vocab_size, ignored=IGNORE_INDEX)


def check_token_ids(name: str, ids: Tensor, vocab_size: int, ignored: int = 0) -> None:
    """Raise DataError if an id is outside the vocabulary.

    Looks only at ids on the CPU: an answer from a GPU would have to wait for all its work.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    lowest, highest = ids.aminmax()
    if highest >= vocab_size or lowest < 0:
        outside = ids[((ids < 0) | (ids >= vocab_size)) & (ids != ignored)]
        if outside.numel():
            raise DataError(
                f"{name} holds token {outside[0].item()}, but this model's vocabulary is 0 to "
                f"{vocab_size - 1}: was the text encoded with another tokenizer?"
            )


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, int]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise DataError(f"{name} has shape {tuple(tensor.shape)}, but input_ids ask for {shape}")
