"""A continuation with its distributions: the text of generate_text, and what it was drawn from."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generate import generate_text
from horovod_lm.jupyter import continuation_html
from horovod_lm.jupyter.continuation import (
    Continuation,
    save_continuations,
    trace_text,
    write_in_slices,
)
from horovod_lm.jupyter.drawn_token import SHOWN, DrawnToken, find_distributions, surprise
from horovod_lm.models.sampling import filtered_probabilities
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import GenerationConfig
from horovod_lm.utils.errors import DataError

TOKENIZER = ByteTokenizer()
UNFILTERED = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
HOW = GenerationConfig(max_new_tokens=30, seed=3, temperature=1.3, top_k=40, top_p=0.95)


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
    *_, last = write_in_slices(model, TOKENIZER, prompt, config, seconds=seconds)
    assert last.texts == generate_text(model, TOKENIZER, prompt, **how)
    assert last.state == "done" and model.training


def test_the_first_slice_is_one_token_and_the_text_only_grows(model):
    lengths = [
        one.n_tokens for one in write_in_slices(model, TOKENIZER, "Once", HOW, seconds=0.002)
    ]
    assert lengths[0] == 1 and lengths == sorted(lengths) and len(set(lengths)) > 2


def test_a_text_left_half_way_leaves_the_model_as_it_was(model):
    slices = write_in_slices(model, TOKENIZER, "Once", HOW)
    assert next(slices).state == "writing" and not model.training
    slices.close()
    assert model.training


def test_each_distribution_is_the_one_that_the_model_gives(model):
    [sample] = trace_text(
        model, TOKENIZER, "Once", HOW.model_copy(update={"max_new_tokens": 15})
    ).samples
    ids = [256, *b"Once"]
    for token in sample:
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([ids]))[0][0, -1]
        before, after = logits.softmax(dim=-1), filtered_probabilities(logits, HOW)
        assert token.before == pytest.approx(before[token.token_id].item(), rel=1e-4)
        found = token.distribution
        assert (
            found.after == pytest.approx(after[token.token_id].item(), rel=1e-4) and found.after > 0
        )
        assert found.n_kept == int((after > 0).sum())
        assert found.rank == 1 + int((before > before[token.token_id]).sum())
        best = before.topk(SHOWN).indices.tolist()
        assert [one.token_id for one in found.candidates][:SHOWN] == best
        ids.append(token.token_id)
    model.train()


def test_the_drawn_token_is_a_candidate_even_when_it_was_unlikely():
    logits = torch.linspace(5, -5, 257)
    logits = logits.expand(2, -1)
    ids = torch.tensor([200, 0])
    found, likely = find_distributions(logits, ids, UNFILTERED)
    assert len(likely.candidates) == SHOWN and likely.rank == 1
    assert len(found.candidates) == SHOWN + 1 and found.candidates[-1].token_id == 200
    assert found.rank == 201 and found.n_kept == 257
    _, greedy = find_distributions(logits, ids, GenerationConfig(temperature=0.0))
    assert (greedy.after, greedy.n_kept, len(greedy.candidates)) == (1.0, 1, SHOWN)


def test_end_of_text_is_a_token_and_no_text(model):
    how = GenerationConfig(
        max_new_tokens=200, seed=0, temperature=5.0, top_k=0, top_p=1.0, num_samples=16
    )
    continuation = trace_text(model, TOKENIZER, "", how)
    end = TOKENIZER.eot_id
    ended = [sample for sample in continuation.samples if sample[-1].token_id == end]
    assert ended and ended[0][-1].text == "<|endoftext|>"
    assert all(one.token_id != end for sample in continuation.samples for one in sample[:-1])
    assert not any("endoftext" in text for text in continuation.texts)


def test_without_a_seed_one_is_chosen_and_repeats_the_text(model):
    state = torch.random.get_rng_state()
    first = trace_text(model, TOKENIZER, "a", HOW.model_copy(update={"seed": None}))
    assert first.settings.seed is not None
    assert trace_text(model, TOKENIZER, "a", first.settings).texts == first.texts
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompt_that_cannot_be_encoded_is_one_sentence(model):
    with pytest.raises(DataError, match="unpaired surrogate"):
        trace_text(model, TOKENIZER, "a\ud800", HOW)


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(1, 0), (0.1, 1 / 3), (0.01, 2 / 3), (0.001, 1), (1e-9, 1), (0, 1)],
)
def test_surprise_is_a_third_for_each_power_of_ten(probability, expected):
    assert surprise(probability) == pytest.approx(expected)
    assert math.copysign(1, surprise(probability)) == 1


# ---- as HTML -------------------------------------------------------------------------------------

NASTY = "<script>alert(1)</script>\x1b[2J\u202eab'\"&"


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_text_and_tokens_are_escaped_wherever_they_stand(model):
    continuation = trace_text(model, TOKENIZER, NASTY, HOW)
    tokens = TOKENIZER.encode(NASTY)
    logits = torch.zeros(len(tokens), 257)
    how = UNFILTERED
    continuation.samples = [
        [
            DrawnToken(token, 0.5, row, how, TOKENIZER)
            for token, row in zip(tokens, logits, strict=True)
        ]
    ]
    tables = "".join(map(continuation_html.distribution_table, continuation.samples[0]))
    page = continuation_html.side_by_side([continuation], ["<b>name</b>"]) + tables
    assert "<script>" not in page and "\x1b" not in page and "\u202e" not in page
    assert (
        "&lt;script&gt;" in page and "&lt;b&gt;name" in page and "␛" in page and "⟨U+202E⟩" in page
    )


def test_a_table_says_every_number_and_marks_the_drawn_token(model):
    token = trace_text(model, TOKENIZER, "Once", HOW).samples[0][0]
    table = continuation_html.distribution_table(token)
    assert table.count("<tr") == 2 + len(token.distribution.candidates)
    assert table.count("aria-current='true'") == 1
    assert f"number {token.distribution.rank} by likelihood" in table
    shown = [float(number) for number in re.findall(r">([01]\.\d{4})<", table)]
    assert sum(shown[::2]) == pytest.approx(1, abs=0.005)
    assert sum(shown[1::2]) == pytest.approx(1, abs=0.005)


def test_colours_grow_with_surprise():
    shares = [
        float(continuation_html.colour_of(surprise(p)).split()[-1].rstrip(")"))
        for p in (1, 0.5, 0.1, 0.01, 0.001)
    ]
    assert shares[0] == 0 and shares == sorted(set(shares)) and shares[-1] == 0.6


def test_settings_stand_side_by_side_in_words(model):
    one = trace_text(model, TOKENIZER, "a", HOW)
    two = trace_text(model, TOKENIZER, "a", HOW.model_copy(update={"top_k": 0, "num_samples": 2}))
    page = continuation_html.side_by_side([one, two], ["text 1", "text 2"])
    assert "temperature 1.3, top-k 40, top-p 0.95, seed 3, 30 tokens" in page
    assert "top-k all" in page and "2 samples" in page and page.count("<section") == 2
    assert one._repr_html_() in page


# ---- saved ---------------------------------------------------------------------------------------


def test_saved_texts_are_lines_of_json_that_say_how_they_came(model, tmp_path):
    texts = [trace_text(model, TOKENIZER, prompt, HOW) for prompt in ("Once", "a\ud7ff🙂\n")]
    path = tmp_path / "new" / "texts.jsonl"
    for text in texts:
        save_continuations(path, [text])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["texts"] for row in rows] == [text.texts for text in texts]
    for row, text in zip(rows, texts, strict=True):
        again = trace_text(model, TOKENIZER, row["prompt"], GenerationConfig(**row["settings"]))
        assert again.texts == row["texts"] and row["state"] == "done"
        tokens = itertools.chain(*text.samples)
        for saved, token in zip(itertools.chain(*row["tokens"]), tokens, strict=True):
            assert saved == {
                "id": token.token_id, "before": token.before, "after": token.distribution.after,
            }  # fmt: skip


def test_an_empty_continuation_is_shown():
    empty = Continuation("", HOW, TOKENIZER)
    assert empty.texts == [] and str(empty) == "" and "<div" in empty._repr_html_()
