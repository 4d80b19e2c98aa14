"""TransformerLM: masking, cache, loss, gradient checkpointing, parameters, invalid input."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from horovod_lm.models import attention
from horovod_lm.models.attention import KVCache
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.errors import ConfigError, DataError


def random_ids(n_sequences=3, length=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 50, (n_sequences, length), generator=generator)


def gradients(model, *args, **kwargs):
    model.zero_grad(set_to_none=True)
    _, loss = model(*args, **kwargs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gpt2_small_has_gpt2s_number_of_parameters():
    with torch.device("meta"):
        model = TransformerLM(max_seq_len=1024)
    assert model.num_parameters() == 124_439_808


def test_compiled_layers_give_the_same_numbers_and_each_its_own_backward_pass():
    model, ids = TransformerLM(67, 32, 4, 3, 64, 16, 0.0, 0), random_ids(2, 16)
    eager = gradients(model, ids, labels=ids, return_logits=False)
    model.compile_layers(backend="aot_eager")
    found = gradients(model, ids, labels=ids, return_logits=False)
    torch.testing.assert_close(found, eager)
    # Not one for the whole model, which would deliver all gradients at its end.
    nodes, compiled = [model(ids, labels=ids, return_logits=False)[1].grad_fn], set()
    while nodes:
        node = nodes.pop()
        compiled |= {node} if node.name() == "CompiledFunctionBackward" else set()
        nodes += [inner for inner, _ in node.next_functions if inner is not None]
    assert len(compiled) == len(model.blocks) + 1  # and the loss


def test_the_operations_of_a_step_are_those_that_torch_counts(monkeypatch):
    # torch counts products, and not what its fused kernel for CPUs does.
    monkeypatch.setattr(
        attention, "sdpa_attention", lambda *a: attention.naive_attention(*a[:4])[0]
    )
    model, ids = TransformerLM(67, 32, 4, 3, 64, 16, 0.0, 0), random_ids(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids)[1].backward()
    assert model.flops_per_token() * ids.numel() == counter.get_total_flops()


@pytest.mark.parametrize("changed", [1, 6, 11])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_changing_a_future_token_changes_no_past_logit(make_model, changed, padding):
    model, ids = make_model().eval(), random_ids()
    mask = None
    if padding != "none":
        mask = torch.ones_like(ids)
        mask[1, :5] = mask[2, :9] = 0
        mask = mask if padding == "left" else mask.flip(1)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 7) % 50
    with torch.no_grad():
        before, _ = model(ids, mask)
        after, _ = model(other, mask)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("parts", [[1] * 12, [4, 1, 7]])
def test_parts_with_a_cache_equal_one_forward_pass(make_model, parts):
    model = make_model().double().eval()
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for given_mask in (None, mask):
        cache, logits, end = KVCache(3, capacity=12), [], 0
        with torch.no_grad():
            whole, _ = model(ids, given_mask)
            for part in ids.split(parts, dim=1):
                end += part.shape[1]
                part_mask = None if given_mask is None else given_mask[:, :end]
                logits.append(model(part, part_mask, cache=cache)[0])
        torch.testing.assert_close(torch.cat(logits, 1), whole)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_empty_batch_gives_zero_loss_and_a_zero_gradient_to_every_parameter(
    make_model, checkpointing, bfloat16
):
    model = make_model(dropout=0.1, gradient_checkpointing=checkpointing).train()
    ids = random_ids()[:0]
    for return_logits in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, grads = gradients(model, ids, labels=ids, return_logits=return_logits)
        assert loss == 0.0 and len(grads) == len(list(model.parameters()))
        assert not any(gradient.any() for gradient in grads.values())


# Gradient checkpointing was wrong once (fault 5): a lambda in the loop used the last block.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_no_bit(make_model, left_padded, dropout, padded):
    ids, mask = left_padded
    results, calls = [], []
    for checkpointing in (False, True):
        model = make_model(dropout=dropout, gradient_checkpointing=checkpointing).train()
        for block in model.blocks:
            block.register_forward_pre_hook(lambda block, _: calls.append(block))
        torch.manual_seed(1)
        calls.clear()
        results.append(gradients(model, ids, mask if padded else None, ids, return_logits=False))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert calls == [*model.blocks, *reversed(model.blocks)]  # each block is recomputed once


def test_state_dict_holds_parameters_only_all_of_them_float(make_model):
    model = make_model()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not list(model.buffers())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("d_model", "deviation"), [(768, 0.02), (192, 0.04)])
def test_weights_start_with_gpt2s_deviation_and_residual_projections_smaller(d_model, deviation):
    torch.manual_seed(0)
    block = TransformerLM(100, d_model, 4, 8, 512, 64).blocks[3]
    assert block.attention.qkv_proj.weight.std().item() == pytest.approx(deviation, rel=0.05)
    for layer in (block.attention.out_proj, block.feed_forward.down_proj):
        small = deviation / 4  # sqrt(2 * 8) = 4
        assert layer.weight.std().item() == pytest.approx(small, rel=0.05)
        assert not layer.bias.any()


def test_invalid_sizes_are_one_sentence(make_model):
    with pytest.raises(ConfigError, match=r"d_model \(30\) must be divisible by n_heads \(4\)"):
        make_model(d_model=30)
    with pytest.raises(ConfigError, match="TransformerLM: model.n_layers must be greater than 0"):
        make_model(n_layers=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"input_ids": torch.zeros(17, dtype=torch.long)}, r"shape \(batch, length\)"),
        ({"input_ids": torch.zeros(1, 4)}, "integers.*float32"),
        ({"input_ids": torch.zeros(1, 17, dtype=torch.long)}, "17 tokens, more .* = 16"),
        ({"input_ids": torch.tensor([[-1, 50]])}, r"token -1, outside .*vocabulary \(0 to 49\)"),
        ({"labels": torch.tensor([[3, -100, 99]])}, "labels contains token 99"),
        ({"labels": torch.tensor([[3, 4]])}, r"labels has shape \(1, 2\), expected \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\)"),
    ],
)
def test_invalid_input_is_one_sentence(make_model, arguments, sentence):
    arguments = {"input_ids": torch.tensor([[1, 2, 3]])} | arguments
    with pytest.raises(DataError, match=sentence) as error:
        make_model()(**arguments)
    assert "\n" not in str(error.value)


def test_labels_may_be_minus_100_and_ids_int32(make_model):
    model = make_model()
    ids = random_ids()
    assert torch.equal(model(ids.int())[0], model(ids)[0])
    labels = torch.full_like(ids, -100)
    assert model(ids, labels=labels)[1] == 0.0
    assert model(ids, labels=ids.int())[1] == model(ids, labels=ids)[1]
