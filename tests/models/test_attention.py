"""sdpa_attention equals naive_attention, and no position attends to the future or to padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.models.attention import causal_mask, naive_attention, sdpa_attention


def random_heads(n_queries: int, n_keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    lengths = (n_queries, n_keys, n_keys)
    return tuple(
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for length in lengths
    )


@settings(max_examples=50, deadline=None)
@given(
    padding=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2),
    n_queries=st.integers(1, 6),
)
def test_sdpa_equals_naive_without_and_with_any_padding(padding, n_queries):
    heads = random_heads(n_queries, 6)
    torch.testing.assert_close(sdpa_attention(*heads), naive_attention(*heads)[0])
    mask = causal_mask(n_queries, 6, torch.tensor(padding))
    output, weights = naive_attention(*heads, mask)
    torch.testing.assert_close(sdpa_attention(*heads, mask), output)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, n_queries, dtype=torch.float64))
    assert not weights[~mask.expand_as(weights)].any()


def test_bfloat16_on_a_cpu_is_computed_by_products_within_its_precision(monkeypatch):
    """Values and gradients have the error of bfloat16, as those of torch's kernel have."""
    heads = [part.bfloat16().requires_grad_() for part in random_heads(6, 6)]

    def errors() -> list[float]:
        output = sdpa_attention(*heads)
        gradients = torch.autograd.grad(output.sum(), heads)
        exact = [part.detach().double().requires_grad_() for part in heads]
        expected = naive_attention(*exact)[0]
        expected_gradients = torch.autograd.grad(expected.sum(), exact)
        pairs = zip((output, *gradients), (expected, *expected_gradients), strict=True)
        return [((own - other).norm() / other.norm()).item() for own, other in pairs]

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        assert max(errors()) < 0.02
    monkeypatch.setattr("horovod_lm.models.attention.MAX_LENGTH_OF_PRODUCTS", 5)
    assert max(errors()) < 0.02


def test_a_fully_masked_query_gives_zeros_and_finite_gradients():
    query, key, value = random_heads(4, 4)
    query.requires_grad_()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:] = True
    output, weights = naive_attention(query, key, value, mask)
    assert not output[:, :, :2].any() and not weights[:, :, :2].any()
    output.sum().backward()
    assert query.grad.isfinite().all()
    torch.testing.assert_close(sdpa_attention(query, key, value, mask), output)


def test_causal_mask_by_hand():
    assert causal_mask(2, 3).tolist() == [[[[True, True, False], [True, True, True]]]]
    left_padding = causal_mask(3, 3, torch.tensor([[0, 1, 1]]))
    assert left_padding[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
