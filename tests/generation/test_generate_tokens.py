"""TransformerLM.generate: cached equals uncached, rows are independent, ended rows are padded."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.generation.sampling import generate_tokens, make_generator
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import GenerationConfig
from horovod_lm.utils.errors import DataError

GREEDY = GenerationConfig(max_new_tokens=9, temperature=0.0)


def test_a_row_of_a_padded_batch_equals_the_row_alone(make_model, left_padded):
    model = make_model().double()
    ids, mask = left_padded
    together = model.generate(ids, 40, 0.0, eos_token_id=None, attention_mask=mask)
    for row in range(3):
        alone = model.generate(ids[row, mask[row] == 1][None], 40, 0.0, eos_token_id=None)
        assert torch.equal(alone[0, -40:], together[row, -40:])


def test_greedy_is_the_argmax_of_forward_and_continues_from_the_newer_half(make_model):
    model = make_model().double().eval()
    text = model.generate(torch.tensor([[1, 2, 3]]), 30, 0.0, eos_token_id=None)[0]
    # Position 16 is the last with the whole text in its context; then the context is the newest
    # 8 tokens and grows to 16 again.
    with torch.no_grad():
        for end in range(3, 33):
            start = 0 if end <= 16 else 9 if end < 26 else 18
            if end - start <= 16:
                logits, _ = model(text[None, start:end])
                assert text[end] == logits[0, -1].argmax(), end


@pytest.mark.parametrize("pad_token_id", [49, None, 50256])
def test_ended_rows_are_filled_with_padding_or_without_it_with_end_of_text(
    make_model, pad_token_id
):
    model = make_model(pad_token_id=pad_token_id)
    ids = torch.randint(1, 49, (4, 3))
    eos = model.generate(ids, 1, 0.0, eos_token_id=None)[0, -1].item()
    text = model.generate(ids, 8, 0.0, eos_token_id=eos)
    assert text[0, 3] == eos
    assert set(text[0, 4:].tolist()) <= {49 if pad_token_id == 49 else eos}


def test_seeds_generators_and_the_global_generator(make_model):
    model = make_model()
    ids = torch.tensor([[1, 2]])

    def text(**how):
        return model.generate(ids, 14, 1.5, top_k=0, top_p=None, eos_token_id=None, **how).tolist()

    before = torch.get_rng_state()
    assert text(seed=1) == text(seed=1) == text(generator=torch.Generator().manual_seed(1))
    assert text(seed=1) != text(seed=2)
    assert text() != text()
    assert torch.equal(before, torch.get_rng_state())


def test_a_prompt_longer_than_the_context_is_cut_on_the_left_with_a_warning(make_model):
    model = make_model().double()
    ids = torch.randint(1, 50, (1, 25))
    with pytest.warns(UserWarning, match="prompt has 25 tokens, more than .*context of 16"):
        text = model.generate(ids, 5, 0.0, eos_token_id=None)
    assert torch.equal(text[:, :25], ids)
    end = model.generate(ids[:, -16:], 5, 0.0, eos_token_id=None)
    assert torch.equal(text[:, 25:], end[:, 16:])
    mask = (torch.arange(25) >= 12).long()[None]  # 13 tokens: padding does not count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = model.generate(ids, 5, 0.0, eos_token_id=None, attention_mask=mask)
    alone = model.generate(ids[:, 12:], 5, 0.0, eos_token_id=None)
    assert torch.equal(padded[:, 25:], alone[:, 13:])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    new_tokens=st.integers(1, 40),  # a context of 16 is filled several times
    temperature=st.sampled_from([0.0, 0.3, 2.0]),
    top_k=st.sampled_from([None, 0, 1, 5, 500]),
    top_p=st.sampled_from([None, 0.1, 1.0]),
    eos=st.sampled_from([None, 7]),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_cached_equals_uncached_for_any_prompts_and_settings(
    lengths, new_tokens, temperature, top_k, top_p, eos, seed
):
    torch.manual_seed(seed)
    model = TransformerLM(50, 32, 4, 2, 64, 16, 0.1, 0).double()
    width = max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = torch.randint(1, 50, mask.shape) * mask
    arguments = (ids, new_tokens, temperature, top_k, top_p, eos, mask)
    text = model.generate(*arguments, seed=seed)
    assert text.shape[0] == len(lengths) and width <= text.shape[1] <= width + new_tokens
    assert torch.equal(text, model.generate(*arguments, seed=seed, use_cache=False))
    assert 0 <= text.min() and text.max() < 50
    assert model.training


def test_dropout_is_off_and_the_mode_is_restored_even_when_closed_early(make_model):
    model = make_model(dropout=0.5).train()
    ids, seen = torch.tensor([[1, 2]]), []
    first, second = (model.generate(ids, 9, 0.0, eos_token_id=None) for _ in range(2))
    assert torch.equal(first, second) and model.training
    assert not torch.equal(model(ids)[0], model(ids)[0])  # dropout, in training only
    steps = generate_tokens(
        model, ids, GREEDY, generator=make_generator(0, "cpu"), on_logits=seen.append
    )
    assert torch.equal(next(steps), seen[0].argmax(dim=-1)) and seen[0].shape == (1, 50)
    steps.close()
    assert model.training
    model(ids, labels=ids)[1].backward()  # inference mode has ended too


def test_generation_processes_each_token_once(make_model):
    model, read = make_model(), []
    model.token_embedding.register_forward_hook(lambda _, ids, __: read.append(ids[0].shape[1]))
    model.generate(torch.randint(1, 50, (2, 6)), 8, eos_token_id=None)
    assert read == [6] + [1] * 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
        ({"input_ids": torch.zeros(1, 3)}, "float32"),
        ({"input_ids": torch.tensor([[1, 77]])}, "input_ids contains token 77"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "end with a one"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask has shape"),
    ],
)
def test_invalid_prompts_are_one_sentence(make_model, arguments, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        make_model().generate(**({"input_ids": torch.tensor([[1, 2, 3]])} | arguments))
    assert "\n" not in str(caught.value)
    assert make_model().generate(torch.zeros(0, 3, dtype=torch.long), 5).shape[0] == 0
