"""The learning rate schedule, the parameter groups, and the choice of the precision."""

from __future__ import annotations

import math

import pytest
import torch

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training import optimizer as optimization
from horovod_lm.training.optimizer import (
    autocast,
    build_optimizer,
    build_scaler,
    build_scheduler,
    choose_amp_dtype,
    learning_rate_factor,
)
from horovod_lm.utils.config import TrainingConfig
from horovod_lm.utils.errors import ConfigError

CPU = torch.device("cpu")


def model() -> TransformerLM:
    return TransformerLM(vocab_size=11, d_model=8, n_heads=2, n_layers=2, d_ff=16, max_seq_len=4,
                         pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        # 4 steps of warm-up, then from the peak down to a tenth of it in the 8 steps to step 12.
        ("cosine", {4: 1.0, 6: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 8: 0.55, 12: 0.1, 50: 0.1}),
        ("linear", {4: 1.0, 6: 0.775, 8: 0.55, 10: 0.325, 12: 0.1, 50: 0.1}),
        ("constant", {4: 1.0, 8: 1.0, 12: 1.0, 50: 1.0}),
    ],
)
def test_the_rate_by_hand(schedule, wanted):
    training = TrainingConfig(lr_schedule=schedule, warmup_steps=4, min_learning_rate_fraction=0.1)
    factor = learning_rate_factor(training, total_steps=12)
    assert [factor(step) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]
    for step, value in wanted.items():
        assert factor(step) == pytest.approx(value, rel=1e-12), step


@pytest.mark.parametrize(("scaled", "peak"), [(False, 0.5), (True, 2.0)])
def test_the_rate_of_a_resumed_schedule_on_four_ranks(scaled, peak):
    training = TrainingConfig(learning_rate=0.5, warmup_steps=5, scale_lr_with_world_size=scaled)
    optimizer, factor = build_optimizer(model(), training), learning_rate_factor(training, 30)
    scheduler = build_scheduler(optimizer, training, 30, world_size=4, steps_done=3)
    for step in range(3, 30):
        assert optimizer.param_groups[1]["lr"] == scheduler.get_last_lr()[0] == peak * factor(step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adamw", {"lr": 0.5, "betas": (0.8, 0.7), "eps": 1e-3}),
        ("sgd", {"lr": 0.5, "momentum": 0.6}),
    ],
)
def test_settings_reach_the_optimizer_and_only_matrices_are_decayed(kind, settings):
    training = TrainingConfig(optimizer=kind, weight_decay=0.3, learning_rate=0.5, beta1=0.8,
                              beta2=0.7, epsilon=1e-3, momentum=0.6)  # fmt: skip
    net = model()
    groups = build_optimizer(net, training).param_groups
    assert all(settings.items() <= group.items() for group in groups)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        matrix = name.endswith("weight") and parameter.dim() == 2
        assert decay_of[id(parameter)] == (0.3 if matrix else 0.0), name
    assert len(decay_of) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("dtype", "amp", "speedup", "wanted"),
    [
        ("float32", "auto", 1.2, torch.bfloat16),
        ("float32", "auto", 1.05, torch.float32),
        ("float32", "auto", None, torch.float32),  # no instructions: nothing is measured
        ("float32", "float32", 1.2, torch.float32),
        ("float32", "bfloat16", None, torch.bfloat16),
        ("float32", "float16", None, torch.float16),
        ("float64", "auto", 1.2, torch.float64),
        ("float64", "float32", 1.2, torch.float64),
        ("float64", "bfloat16", 1.2, None),
        ("float64", "float16", 1.2, None),
    ],
)
def test_the_precision_that_is_chosen(monkeypatch, dtype, amp, speedup, wanted):
    monkeypatch.setattr(optimization, "has_fast_bfloat16", lambda device: speedup is not None)
    monkeypatch.setattr(optimization, "bfloat16_speedup", lambda model, batch_size: speedup)
    training = TrainingConfig(dtype=dtype, amp_dtype=amp)
    if wanted is None:
        with pytest.raises(ConfigError, match=f"training.amp_dtype {amp} cannot go with .*float64"):
            choose_amp_dtype(training, model())
        return
    assert choose_amp_dtype(training, model()) == wanted
    for saved in ("float32", "bfloat16"):  # by a run that is resumed
        kept = choose_amp_dtype(training, model(), {"training": {"amp_dtype": saved}})
        assert kept == (wanted if amp != "auto" or dtype == "float64" else getattr(torch, saved))
    for unknown in (None, {}, {"training": None}, {"training": {"amp_dtype": "auto"}}):
        assert choose_amp_dtype(training, model(), unknown) == wanted


def test_a_measured_model_is_as_before():
    measured = model()
    before = {name: value.clone() for name, value in measured.state_dict().items()}
    assert 0 < optimization.bfloat16_speedup(measured, batch_size=3) < 100
    assert all(torch.equal(value, before[name]) for name, value in measured.state_dict().items())
    assert all(parameter.grad is None for parameter in measured.parameters())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_code_path_for_every_precision_and_a_scaler_for_float16_only(kind):
    # Fault 1: bfloat16 was chosen, so there was no scaler, and `scaler.scale` was called.
    scaler = build_scaler(CPU, kind)
    assert scaler.is_enabled() == (kind == torch.float16)
    net = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = net.weight.detach().clone()
    with autocast(CPU, kind):
        out = net(torch.ones(1, 2))
    assert out.dtype == (torch.float32 if kind == torch.float64 else kind)
    scaler.scale(out.float().sum() / 8).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(net.weight.grad, torch.full((1, 2), 1 / 8))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net.weight.detach(), before - 1 / 8)
