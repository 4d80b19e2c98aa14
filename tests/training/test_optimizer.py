"""The learning rate schedule, the parameter groups, and the choice of the precision."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training import optimizer as optimization
from horovod_lm.training.optimizer import (
    autocast,
    build_optimizer,
    build_scaler,
    build_scheduler,
    choose_amp_dtype,
    learning_rate_factor,
    step_if_finite,
)
from horovod_lm.utils.config import TrainingConfig
from horovod_lm.utils.errors import ConfigError

CPU = torch.device("cpu")


def model() -> TransformerLM:
    return TransformerLM(vocab_size=11, d_model=8, n_heads=2, n_layers=2, d_ff=16, max_seq_len=4,
                         pad_token_id=0)  # fmt: skip


def rates(training: TrainingConfig, total: int, steps: int, start: int = 0, world: int = 1) -> list:
    """Return the rates of `steps` steps, from a schedule that stands at `start`."""
    optimizer = build_optimizer(torch.nn.Linear(2, 2), training)
    build_scheduler(optimizer, training, total, steps_done=3)
    scheduler = build_scheduler(optimizer, training, total, world, start)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        assert seen[-1] == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
    return seen


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


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 60),
    total=st.integers(1, 200),
    low=st.floats(0, 1),
)
def test_the_rate_is_bounded_and_has_no_jumps(schedule, warmup, total, low):
    training = TrainingConfig(
        lr_schedule=schedule, warmup_steps=warmup, min_learning_rate_fraction=low
    )
    factor = learning_rate_factor(training, total)
    values = [factor(step) for step in range(max(total, warmup) + 5)]
    assert all(0 < value <= 1 for value in values[: min(total, warmup + 1)])
    assert all(low - 1e-12 <= value <= 1 for value in values[warmup:])
    decay = max(1, total - warmup)
    largest = max(1 / (warmup + 1), 0.5 * math.pi * (1 - low) / decay) + 1e-12
    assert all(abs(b - a) <= largest for a, b in zip(values, values[1:], strict=False))
    rising, falling = values[: warmup + 1], values[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_a_resumed_schedule_goes_on_where_it_stood():
    """Whatever rates an optimizer has: a loaded one has those of its checkpoint."""
    training = TrainingConfig(warmup_steps=5, learning_rate=0.125)
    whole = rates(training, total=30, steps=30)
    assert whole[0] == 0.125 / 6 and max(whole) == 0.125
    for start in (1, 4, 5, 6, 29):
        assert rates(training, total=30, steps=30 - start, start=start) == whole[start:]


def test_the_rate_grows_with_the_world_only_when_asked_for():
    plain, scaled = (TrainingConfig(scale_lr_with_world_size=on) for on in (False, True))
    alone = rates(plain, 300, 150)
    assert rates(plain, 300, 150, world=4) == alone == rates(scaled, 300, 150, world=1)
    assert rates(scaled, 300, 150, world=4) == pytest.approx([4 * rate for rate in alone])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_matrices_are_decayed_and_nothing_else(kind):
    training = TrainingConfig(optimizer=kind, weight_decay=0.3)
    net = model()
    groups = build_optimizer(net, training).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        matrix = name.endswith("weight") and parameter.dim() == 2
        assert decay_of[id(parameter)] == (0.3 if matrix else 0.0), name
    assert len(decay_of) == len(list(net.parameters()))


def test_settings_reach_the_optimizer():
    training = TrainingConfig(learning_rate=0.5, beta1=0.8, beta2=0.7, epsilon=1e-3, momentum=0.6)
    adamw = build_optimizer(model(), training)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {(g["lr"], g["betas"], g["eps"]) for g in adamw.param_groups} == {
        (0.5, (0.8, 0.7), 1e-3)}  # fmt: skip
    sgd = build_optimizer(model(), training.model_copy(update={"optimizer": "sgd"}))
    assert isinstance(sgd, torch.optim.SGD)
    assert {(g["lr"], g["momentum"]) for g in sgd.param_groups} == {(0.5, 0.6)}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_gradients_that_are_not_finite_change_no_bit(kind):
    scaler = build_scaler(CPU, torch.float32)
    guarded, plain = model(), model()
    plain.load_state_dict(guarded.state_dict())
    steps = [build_optimizer(net, TrainingConfig(optimizer=kind)) for net in (guarded, plain)]
    for bad in (None, float("nan"), None, float("inf")):
        for net in (guarded, plain):
            generator = torch.Generator().manual_seed(3)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        if bad is not None:
            next(guarded.parameters()).grad[0, 0] = bad
        norm = torch.nn.utils.get_total_norm([p.grad for p in guarded.parameters()])
        step_if_finite(steps[0], scaler, norm)
        if bad is None:
            steps[1].step()
        for one, two in zip(guarded.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, two)
            own, other = steps[0].state[one], steps[1].state[two]
            assert own.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in own.items())


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
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = weight.sum()
    scaled = scaler.scale(loss)
    assert (scaled.item() > 4) == (kind == torch.float16)
    scaled.backward()
    scaler.unscale_(optimizer)
    assert torch.equal(weight.grad, torch.ones(2, 2))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), torch.zeros(2, 2))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_autocast_lowers_products_and_leaves_parameters_and_gradients(kind):
    net = torch.nn.Linear(4, 4)
    with autocast(CPU, kind) as context:
        out = net(torch.ones(1, 4))
    full = kind in (torch.float32, torch.float64)
    assert out.dtype == (torch.float32 if full else kind)
    assert isinstance(autocast(CPU, kind), nullcontext) == full and (context is None) == full
    out.sum().backward()
    assert net.weight.dtype == net.weight.grad.dtype == torch.float32
