"""The optimizer, its learning rate, and the precision of the arithmetic."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import TrainingConfig
from horovod_lm.utils.errors import ConfigError
from horovod_lm.utils.machine import has_fast_bfloat16

MIN_SPEEDUP = 1.1  # bfloat16 has fewer digits; a smaller gain would also vary from run to run
MEASURED_POSITIONS, MEASURED_PASSES, MEASURED_SECONDS = 1024, 6, 1.0


def build_optimizer(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW (https://arxiv.org/abs/1711.05101) or SGD; only matrices have weight decay.

    As in GPT-2, biases and norms have none.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
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
    """Return the schedule: a function from optimizer steps done to the fraction of the peak rate.

    Linear warmup over `warmup_steps`, from above 0 to 1; then decay to `min_learning_rate_fraction`
    at `total_steps`: along half a cosine (https://arxiv.org/abs/1608.03983), linear, or constant.
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
    """Return the learning rate scheduler after `steps_done` steps.

    Build it after the optimizer is wrapped and its state is loaded: wrapping makes a new optimizer,
    and a scheduler of the old one changes nothing. The decay ends at `total_steps`, those of the
    whole run.
    """
    peak = training.learning_rate * (world_size if training.scale_lr_with_world_size else 1)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    return LambdaLR(
        optimizer, learning_rate_factor(training, total_steps), last_epoch=steps_done - 1
    )


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, gradient_norm: torch.Tensor
) -> None:
    """Update the parameters, unless the norm of the gradients is not finite.

    AdamW's fused kernel reads `found_inf` on the device, so that the CPU does not wait for a GPU.
    """
    is_fused = isinstance(optimizer, torch.optim.AdamW)
    if is_fused:
        optimizer.found_inf = (~gradient_norm.isfinite()).float()  # type: ignore[attr-defined]
    if is_fused or gradient_norm.isfinite():
        scaler.step(optimizer)
    scaler.update()


def choose_amp_dtype(
    training: TrainingConfig, model: TransformerLM, saved: Mapping[str, Any] | None = None
) -> torch.dtype:
    """Return the dtype of matrix products; float32 and float64 mean full precision.

    `auto` measures the model where the hardware has instructions for bfloat16: a GPU of compute
    capability 8.0 or more, or a CPU with AMX or AVX512-BF16. A run that is resumed keeps what the
    configuration in its checkpoint says: `saved`. Call this before the optimizer is wrapped, which
    reduces the gradients of every backward pass.

    Raises:
        ConfigError: float64 parameters together with a lower precision.
    """
    if training.dtype == "float64":
        if training.amp_dtype in ("bfloat16", "float16"):
            raise ConfigError(
                f"training.amp_dtype {training.amp_dtype} cannot go with training.dtype float64:"
                " set training.amp_dtype to auto"
            )
        return torch.float64
    if training.amp_dtype != "auto":
        return getattr(torch, training.amp_dtype)
    section = (saved or {}).get("training")
    name = section.get("amp_dtype") if isinstance(section, dict) else None
    if name in ("float32", "bfloat16"):
        return getattr(torch, name)
    if not has_fast_bfloat16(next(model.parameters()).device):
        return torch.float32
    speedup = bfloat16_speedup(model, training.per_gpu_batch_size)
    return torch.bfloat16 if speedup >= MIN_SPEEDUP else torch.float32


def bfloat16_speedup(model: TransformerLM, batch_size: int) -> float:
    """Return the time of a forward and backward pass in float32, divided by that in bfloat16.

    Takes a few seconds at most with up to `MEASURED_POSITIONS` random tokens, and removes the
    gradients. In both types the fastest of several passes counts.
    """
    device = next(model.parameters()).device
    rows = max(1, min(batch_size, MEASURED_POSITIONS // model.max_seq_len))
    ids = torch.randint(model.vocab_size, (rows, model.max_seq_len), device=device)
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    end = time.perf_counter() + MEASURED_SECONDS
    for _ in range(MEASURED_PASSES):
        for dtype in fastest:
            started = time.perf_counter()
            with autocast(device, dtype):
                _, loss = model(ids, labels=ids, return_logits=False)
            loss.backward()
            loss.item()  # waits for a GPU
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - started)
            model.zero_grad()
        if time.perf_counter() > end:
            break
    return fastest[torch.float32] / fastest[torch.bfloat16]


def autocast(device: torch.device, amp_dtype: torch.dtype) -> AbstractContextManager:
    """Return a context that runs matrix products in `amp_dtype`; empty for full precision."""
    if amp_dtype in (torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(device.type, dtype=amp_dtype)


def build_scaler(device: torch.device, amp_dtype: torch.dtype) -> torch.amp.GradScaler:
    """Return a gradient scaler, enabled for float16 only: its range is too small for gradients."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
