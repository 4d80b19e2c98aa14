"""The optimizer, its learning rate, and the precision of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.optim.lr_scheduler import LambdaLR

from horovod_lm.utils.config import TrainingConfig
from horovod_lm.utils.errors import ConfigError
from horovod_lm.utils.machine import has_fast_bfloat16


def build_optimizer(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD over the model's parameters, decaying matrices only.

    Decay pulls weights towards 0; biases and norms have no reason to be there (GPT-2's habit, after
    Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": training.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.momentum)
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=True,
    )


def learning_rate_factor(training: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """Return the function from optimizer steps done to the fraction of the peak rate.

    It rises evenly over `warmup_steps` (the first step is not 0), then falls from 1 to
    `min_learning_rate_fraction` at `total_steps`: along half a cosine (Loshchilov & Hutter, 2017,
    https://arxiv.org/abs/1608.03983), along a line, or not at all.
    """
    low, warmup = training.min_learning_rate_fraction, training.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if training.lr_schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if training.lr_schedule == "linear":
            return 1.0 - (1.0 - low) * progress
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    training: TrainingConfig,
    total_steps: int,
    world_size: int = 1,
    steps_done: int = 0,
) -> LambdaLR:
    """Return the learning rate's schedule, standing at `steps_done`.

    Build it last, after the optimizer is wrapped and loaded: wrapping makes a new optimizer, and a
    schedule of the old one turns a wheel that is connected to nothing.

    Args:
        optimizer: the wrapped one.
        training: rate, warm-up and shape.
        total_steps: optimizer steps of the whole run, where the decay ends.
        world_size: multiplies the peak rate if `scale_lr_with_world_size` says so.
        steps_done: optimizer steps behind a resumed run.
    """
    peak = training.learning_rate * (world_size if training.scale_lr_with_world_size else 1)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    return LambdaLR(
        optimizer, learning_rate_factor(training, total_steps), last_epoch=steps_done - 1
    )


def choose_amp_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """Return the type of the matrix products; float32 and float64 mean the parameters' own.

    `auto` takes bfloat16 where the hardware has instructions for it: on a GPU of compute capability
    8.0 or more, and on a CPU with AMX or AVX512-BF16.

    Raises:
        ConfigError: float64 parameters are asked for together with a lower precision.
    """
    if training.dtype == "float64":
        if training.amp_dtype in ("bfloat16", "float16"):
            raise ConfigError(
                f"training.amp_dtype {training.amp_dtype} cannot go with training.dtype float64:"
                " set training.amp_dtype to auto"
            )
        return torch.float64
    if training.amp_dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return getattr(torch, training.amp_dtype)


def autocast(device: torch.device, amp_dtype: torch.dtype) -> AbstractContextManager:
    """Return the context that runs matrix products in `amp_dtype`; none in full precision."""
    if amp_dtype in (torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(device.type, dtype=amp_dtype)


def build_scaler(device: torch.device, amp_dtype: torch.dtype) -> torch.amp.GradScaler:
    """Return a gradient scaler that scales for float16 and passes everything through otherwise.

    Only float16 needs it: its smallest numbers are larger than many gradients. One code path for
    all types is the guard against scaling with a scaler that is not there.
    """
    return torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
