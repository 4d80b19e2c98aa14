"""The chunked loss equals the full loss, forward and backward, for any chunk size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from horovod_lm.models import loss as loss_module
from horovod_lm.models.loss import chunked_cross_entropy, shift_labels, token_losses

V, C = 37, 8


def random_problem(n_positions: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_positions, C, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (n_positions,), generator=generator)
    return hidden, weight, targets


def value_and_gradients(loss, *parameters):
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@settings(max_examples=60, deadline=None)
@given(
    n_positions=st.integers(0, 40),
    chunk_size=st.sampled_from([1, 3, 10, None]),
    ignored=st.sets(st.integers(0, 39)),
)
def test_chunks_equal_the_whole_in_float64(n_positions, chunk_size, ignored):
    hidden, weight, targets = random_problem(n_positions)
    targets[[i for i in ignored if i < n_positions]] = -100
    logits = hidden @ weight.T
    losses, predictions = token_losses(hidden, weight, targets, chunk_size)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none").detach())
    assert torch.equal(predictions, logits.argmax(-1))
    chunked = chunked_cross_entropy(hidden, weight, targets, chunk_size)
    ours = value_and_gradients(3.0 * chunked, hidden, weight)
    if (targets == -100).all():
        assert all(not tensor.any() for tensor in ours)
        return
    theirs = value_and_gradients(3.0 * F.cross_entropy(logits, targets), hidden, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "scale", "rtol", "atol"),
    [
        (torch.float32, 1.0, 1.3e-6, 1e-5),
        (torch.bfloat16, 1.0, 0.05, 0.01),
        (torch.float16, 2.0**16, 0.05, 0.01),
    ],
)
def test_chunks_equal_the_whole_in_float32_and_nearly_under_autocast(dtype, scale, rtol, atol):
    hidden, weight, targets = random_problem(64, torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        chunked = chunked_cross_entropy(hidden, weight, targets, chunk_size=5)
    ours = value_and_gradients(chunked * scale, hidden, weight)
    theirs = value_and_gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our / scale, their, rtol=rtol, atol=atol)


def test_memory_holds_one_chunk_of_logits_and_two_gradients(monkeypatch):
    seen, real = [], loss_module._loss_and_gradient

    def watched(logits, targets):
        seen.append(logits.numel())
        return real(logits, targets)

    monkeypatch.setattr(loss_module, "_loss_and_gradient", watched)
    monkeypatch.setitem(loss_module.MAX_LOGITS_PER_CHUNK, "cpu", 6 * V)
    hidden, weight, targets = random_problem(40)
    loss = chunked_cross_entropy(hidden, weight, targets)
    assert len(seen) > 1 and max(seen) <= 6 * V and sum(seen) == 40 * V
    function = loss.grad_fn.next_functions[0][0]
    assert {tuple(gradient.shape) for gradient in function.gradients} == {(40, C), (V, C)}


def test_a_padded_vocabulary_changes_no_number(monkeypatch):
    """GPUs pad; `_logits` gives the padding no probability, and no gradient reaches beyond V."""
    for dtype in (torch.float32, torch.float64):
        problem = random_problem(20, dtype)
        found = []
        for multiple in (1, 16):  # 37 -> 48
            monkeypatch.setitem(loss_module.VOCABULARY_MULTIPLE, "cpu", multiple)
            loss = chunked_cross_entropy(*problem, chunk_size=6)
            scores = token_losses(*problem, chunk_size=6)
            found.append([*value_and_gradients(loss, *problem[:2]), *scores])
        torch.testing.assert_close(found[1], found[0])
        assert found[1][2].shape == (V, C)


def test_a_second_backward_is_an_error_instead_of_wrong_numbers():
    hidden, weight, targets = random_problem(10)
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="return_logits=True"):
        loss.backward()


def test_labels_are_shifted_and_padding_neither_predicts_nor_is_predicted():
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, -100, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    assert shift_labels(labels, mask).tolist() == [
        [2, 3, 4, -100],
        [-100, -100, 8, -100],
        [-100, 3, -100, -100],
    ]
    assert shift_labels(labels)[2].tolist() == [-100, 3, 4, -100]
    assert shift_labels(labels[:, :1]).tolist() == [[-100]] * 3
