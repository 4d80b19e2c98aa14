"""The loss in pieces is the loss: forward and backward, whatever the size of the pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from horovod_lm.models import loss as loss_module
from horovod_lm.models.loss import (
    cross_entropy,
    cross_entropy_in_pieces,
    shift_labels,
    token_losses,
)

V, C = 37, 8


def random_problem(n_positions: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_positions, C, generator=generator, dtype=dtype).requires_grad_()
    vocabulary = torch.randn(V, C, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (n_positions,), generator=generator)
    return hidden, vocabulary, targets


def value_and_gradients(loss, *parameters):
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [loss.detach(), *gradients]


@settings(max_examples=60, deadline=None)
@given(
    n_positions=st.integers(1, 40),
    elements=st.sampled_from([1, V, 3 * V, 10 * V + 5, 10**9]),
    ignored=st.sets(st.integers(0, 39)),
)
def test_pieces_equal_the_whole_in_float64(n_positions, elements, ignored):
    hidden, vocabulary, targets = random_problem(n_positions)
    targets[[i for i in ignored if i < n_positions]] = -100
    pieces = cross_entropy_in_pieces(hidden, vocabulary, targets, elements)
    ours = value_and_gradients(3.0 * pieces, hidden, vocabulary)
    if (targets == -100).all():
        assert all(not tensor.any() for tensor in ours)
        return
    whole = F.cross_entropy(hidden @ vocabulary.T, targets)
    theirs = value_and_gradients(3.0 * whole, hidden, vocabulary)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", [5 * V, 10**9])
def test_pieces_equal_the_whole_in_float32(elements):
    hidden, vocabulary, targets = random_problem(64, torch.float32)
    ours = value_and_gradients(
        cross_entropy_in_pieces(hidden, vocabulary, targets, elements), hidden, vocabulary
    )
    theirs = value_and_gradients(
        F.cross_entropy(hidden @ vocabulary.T, targets), hidden, vocabulary
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("elements", [5 * V, 10**9])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
def test_under_autocast_gradients_are_float32_and_near(elements, dtype, scale):
    hidden, vocabulary, targets = random_problem(64, torch.float32)
    with torch.autocast("cpu", dtype):
        ours = cross_entropy_in_pieces(hidden, vocabulary, targets, elements)
    whole = F.cross_entropy(hidden @ vocabulary.T, targets)
    ours = value_and_gradients(ours * scale, hidden, vocabulary)
    theirs = value_and_gradients(whole, hidden, vocabulary)
    ours = [our / scale for our in ours]
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our, their, rtol=0.05, atol=0.01)


def test_never_holds_more_logits_than_a_piece(monkeypatch):
    seen = []
    real = loss_module._loss_and_gradient
    monkeypatch.setattr(
        loss_module,
        "_loss_and_gradient",
        lambda logits, targets: (seen.append(logits.numel()), real(logits, targets))[1],
    )
    hidden, vocabulary, targets = random_problem(40)
    cross_entropy_in_pieces(hidden, vocabulary, targets, 6 * V).backward()
    assert len(seen) > 1 and max(seen) <= 6 * V and sum(seen) == 40 * V


def test_small_logits_are_one_piece():
    assert loss_module._pieces(2048, 1000, loss_module.ELEMENTS_PER_PIECE) == [slice(0, 2048)]


def test_saved_for_backward_is_no_matrix_of_logits():
    hidden, vocabulary, targets = random_problem(40)
    loss = cross_entropy_in_pieces(hidden, vocabulary, targets, 6 * V)
    function = loss.grad_fn.next_functions[0][0]
    assert {tuple(gradient.shape) for gradient in function.gradients} == {(40, C), (V, C)}


def test_only_what_needs_a_gradient_gets_one():
    hidden, vocabulary, targets = random_problem(10)
    cross_entropy_in_pieces(hidden.detach(), vocabulary, targets).backward()
    assert vocabulary.grad is not None and hidden.grad is None
    with torch.no_grad():
        assert not cross_entropy_in_pieces(hidden, vocabulary, targets).requires_grad


def test_a_second_backward_is_refused_in_words_instead_of_wrong_numbers():
    hidden, vocabulary, targets = random_problem(10)
    loss = cross_entropy_in_pieces(hidden, vocabulary, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="return_logits=True"):
        loss.backward()


def test_an_empty_batch_costs_nothing_and_has_zero_gradients():
    hidden, vocabulary, targets = random_problem(0)
    value, *gradients = value_and_gradients(
        cross_entropy_in_pieces(hidden, vocabulary, targets), hidden, vocabulary
    )
    assert value == 0.0 and gradients[1].shape == (V, C) and not gradients[1].any()
    assert cross_entropy(torch.zeros(0, 3, V), torch.zeros(0, 3, dtype=torch.long)) == 0.0
    losses, guesses = token_losses(hidden, vocabulary, targets)
    assert len(losses) == len(guesses) == 0


def test_token_losses_and_guesses_are_those_of_the_whole():
    hidden, vocabulary, targets = random_problem(33)
    targets[4] = -100
    logits = hidden @ vocabulary.T
    losses, guesses = token_losses(hidden, vocabulary, targets, 7 * V)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none").detach())
    assert losses[4] == 0.0 and torch.equal(guesses, logits.argmax(-1))


def test_uniform_logits_cost_log_v_nats_each():
    loss = cross_entropy_in_pieces(torch.zeros(9, C), torch.randn(V, C), torch.arange(9))
    assert loss.item() == pytest.approx(math.log(V))


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
