"""A continuation with its distributions: generate_text's text, and what each token came from."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generate import generate_text
from horovod_lm.generation.sampling import filtered_probabilities
from horovod_lm.jupyter.widgets.continuation import (
    N_CANDIDATES,
    Continuation,
    colour_of,
    distribution_table,
    generate_in_slices,
    sampled_tokens,
    side_by_side,
    trace_text,
)
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import GenerationConfig
from horovod_lm.utils.errors import DataError

TOKENIZER = ByteTokenizer()
UNFILTERED = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
SETTINGS = GenerationConfig(max_new_tokens=30, seed=3, temperature=1.3, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(257, 32, 4, 2, 64, 24, 0.1, 256).train()


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.text(max_size=40),
    seed=st.integers(),
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    top_k=st.sampled_from([0, 1, 30]),
    top_p=st.sampled_from([0.2, 1.0]),
    num_samples=st.integers(1, 3),
    seconds=st.sampled_from([0.0, 0.005, 10.0]),
)
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_the_text_is_generate_text_s_however_it_is_cut(model, prompt, seconds, **how):
    how = {**how, "max_new_tokens": 40}  # longer than the model's context
    config = GenerationConfig(**how)
    *_, last = generate_in_slices(model, TOKENIZER, prompt, config, seconds=seconds)
    assert last.texts == generate_text(model, TOKENIZER, prompt, **how)
    assert last.state == "done" and model.training


def test_the_first_slice_is_one_token_and_the_text_only_grows(model):
    slices = generate_in_slices(model, TOKENIZER, "Once", SETTINGS, seconds=0.002)
    lengths = [one.n_tokens for one in slices]
    assert lengths[0] == 1 and lengths == sorted(lengths) and len(set(lengths)) > 2


def test_an_unfinished_text_leaves_the_model_as_it_was(model):
    slices = generate_in_slices(model, TOKENIZER, "Once", SETTINGS)
    assert next(slices).state == "writing" and not model.training
    slices.close()
    assert model.training


def test_each_distribution_is_the_model_s(model):
    how = SETTINGS.model_copy(update={"max_new_tokens": 15})
    [sample] = trace_text(model, TOKENIZER, "Once", how).samples
    ids = [256, *b"Once"]
    for token in sample:
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([ids]))[0][0, -1]
        before, after = logits.softmax(dim=-1), filtered_probabilities(logits, SETTINGS)
        assert token.before == pytest.approx(before[token.token_id].item(), rel=1e-4)
        assert token.after == pytest.approx(after[token.token_id].item(), rel=1e-4)
        assert token.after > 0 and token.n_kept == int((after > 0).sum())
        assert token.rank == 1 + int((before > before[token.token_id]).sum())
        best = before.topk(N_CANDIDATES).indices.tolist()
        assert [one.token_id for one in token.candidates][:N_CANDIDATES] == best
        ids.append(token.token_id)
    model.train()


def test_an_improbable_token_is_a_candidate_too():
    logits = torch.linspace(5, -5, 257).expand(2, -1)
    ids = torch.tensor([200, 0])
    found, probable = sampled_tokens(logits, ids, UNFILTERED)
    assert len(probable.candidates) == N_CANDIDATES and probable.rank == 1
    assert len(found.candidates) == N_CANDIDATES + 1 and found.candidates[-1].token_id == 200
    assert found.rank == 201 and found.n_kept == 257
    _, greedy = sampled_tokens(logits, ids, GenerationConfig(temperature=0.0))
    assert (greedy.after, greedy.n_kept, len(greedy.candidates)) == (1.0, 1, N_CANDIDATES)


def test_end_of_text_is_a_token_and_no_text(model):
    how = GenerationConfig(
        max_new_tokens=200, seed=0, temperature=5.0, top_k=0, top_p=1.0, num_samples=16
    )
    continuation = trace_text(model, TOKENIZER, "", how)
    end = TOKENIZER.eot_id
    assert any(sample[-1].token_id == end for sample in continuation.samples)
    assert all(one.token_id != end for sample in continuation.samples for one in sample[:-1])
    assert not any("endoftext" in text for text in continuation.texts)


def test_without_a_seed_one_is_chosen_and_repeats_the_text(model):
    state = torch.random.get_rng_state()
    first = trace_text(model, TOKENIZER, "a", SETTINGS.model_copy(update={"seed": None}))
    assert first.settings.seed is not None
    assert trace_text(model, TOKENIZER, "a", first.settings).texts == first.texts
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompt_that_cannot_be_encoded_is_an_error(model):
    with pytest.raises(DataError):
        trace_text(model, TOKENIZER, "a\ud800", SETTINGS)


NASTY = "<script>alert(1)</script>\x1b[2J\u202eab'\"&"


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_text_and_tokens_are_escaped_in_html(model):
    continuation = trace_text(model, TOKENIZER, NASTY, SETTINGS)
    [first] = sampled_tokens(torch.zeros(1, 257), torch.tensor([0]), UNFILTERED)
    continuation.samples = [[first._replace(token_id=one) for one in TOKENIZER.encode(NASTY)]]
    tables = "".join(distribution_table(TOKENIZER, one) for one in continuation.samples[0])
    html = side_by_side([continuation], ["<b>name</b>"]) + tables
    assert "<script>" not in html and "\x1b" not in html and "\u202e" not in html
    for escaped in ("&lt;script&gt;", "&lt;b&gt;name", "␛", "⟨U+202E⟩"):
        assert escaped in html
    empty = Continuation("", SETTINGS, TOKENIZER)
    assert empty.texts == [] and str(empty) == "" and "<div" in empty._repr_html_()


def test_a_table_has_every_number_and_marks_the_sampled_token(model):
    token = trace_text(model, TOKENIZER, "Once", SETTINGS).samples[0][0]
    table = distribution_table(TOKENIZER, token)
    assert table.count("<tr") == 2 + len(token.candidates)
    assert table.count("aria-current='true'") == 1 and f"rank {token.rank};" in table
    shown = [float(number) for number in re.findall(r">([01]\.\d{4})<", table)]
    assert sum(shown[::2]) == pytest.approx(1, abs=0.005)
    assert sum(shown[1::2]) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize(
    ("probability", "opacity"),
    [(1, 0), (0.1, 0.2), (0.01, 0.4), (0.001, 0.6), (1e-9, 0.6), (0, 0.6)],
)
def test_the_colour_grows_with_each_power_of_ten(probability, opacity):
    assert colour_of(probability) == f"rgba(230, 159, 0, {opacity:.3f})"


def test_texts_stand_side_by_side_with_their_settings(model):
    one = trace_text(model, TOKENIZER, "a", SETTINGS)
    other = SETTINGS.model_copy(update={"top_k": 0, "num_samples": 2})
    html = side_by_side([one, trace_text(model, TOKENIZER, "a", other)], ["text 1", "text 2"])
    assert "temperature 1.3, top-k 40, top-p 0.95, seed 3, 30 tokens" in html
    assert "top-k all" in html and "2 samples" in html and html.count("<section") == 2
    assert one._repr_html_() in html
