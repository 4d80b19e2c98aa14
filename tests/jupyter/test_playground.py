"""The playground without a browser: its texts and distributions, its buttons and its errors."""

from __future__ import annotations

import asyncio
import gc
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generate import generate_text
from horovod_lm.generation.sampling import filtered_probabilities
from horovod_lm.jupyter.widgets.playground import (
    N_CANDIDATES,
    Continuation,
    Playground,
    colour_of,
    distribution_table,
    generate_in_slices,
    sampled_tokens,
    trace_text,
)
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import GenerationConfig, config_from_dict
from horovod_lm.utils.errors import DataError

TOKENIZER = ByteTokenizer()
UNFILTERED = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
SETTINGS = GenerationConfig(max_new_tokens=30, seed=3, temperature=1.3, top_k=40, top_p=0.95)
HOW = {"max_new_tokens": 30, "temperature": 1.2, "top_k": 40, "top_p": 0.95, "seed": 5}
NASTY = "<script>alert(1)</script>\x1b[2J\u202eab'\"&"


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(257, 32, 4, 2, 64, 24, 0.1, 256)
    with torch.no_grad():
        model.token_embedding.weight[256] = 0.0  # it hardly ever ends by itself
    return model.train()


# ---- a text with its distributions ---------------------------------------------------------------


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


def test_a_text_grows_from_one_token_and_an_unfinished_one_leaves_the_model_as_it_was(model):
    slices = generate_in_slices(model, TOKENIZER, "Once", SETTINGS, seconds=0.002)
    lengths = [one.n_tokens for one in slices]
    assert lengths[0] == 1 and lengths == sorted(lengths) and len(set(lengths)) > 2
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


def test_end_of_text_is_the_last_token_and_no_text(model):
    how = UNFILTERED.model_copy(update={"temperature": 5.0, "num_samples": 16, "seed": 0})
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
    with pytest.raises(DataError):
        trace_text(model, TOKENIZER, "a\ud800", SETTINGS)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_text_and_tokens_are_escaped_in_html(model):
    continuation = trace_text(model, TOKENIZER, NASTY, SETTINGS)
    [first] = sampled_tokens(torch.zeros(1, 257), torch.tensor([0]), UNFILTERED)
    continuation.samples = [[first._replace(token_id=one) for one in TOKENIZER.encode(NASTY)]]
    tables = "".join(distribution_table(TOKENIZER, one) for one in continuation.samples[0])
    html = continuation._repr_html_() + tables
    assert "<script>" not in html and "\x1b" not in html and "\u202e" not in html
    for escaped in ("&lt;script&gt;", "␛", "⟨U+202E⟩"):
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


def test_the_colour_grows_with_each_power_of_ten():
    for probability, opacity in ((1, 0), (0.1, 0.2), (0.01, 0.4), (0.001, 0.6), (0, 0.6)):
        assert colour_of(probability) == f"rgba(230, 159, 0, {opacity:.3f})"


# ---- the widget ----------------------------------------------------------------------------------


@pytest.fixture
def playground(model):
    made = Playground(model, TOKENIZER, config_from_dict({"generation": HOW}))
    yield made
    made.close()


def write(playground: Playground, during=None) -> None:
    """Click Generate and let the event loop work until the text is there."""

    async def work() -> None:
        playground.generate.click()
        if during is not None:
            await during()
        while playground.is_busy:
            await asyncio.sleep(0.001)

    asyncio.run(work())


def select(playground: Playground, sample: int, index: int) -> None:
    """Receive the selection of a token as from the browser."""
    playground.view._handle_custom_msg([sample, index], [])


def test_the_same_seed_writes_what_generate_text_writes(playground, model):
    write(playground)
    expected = generate_text(model, TOKENIZER, "Once upon a time", **HOW)
    assert playground.continuation.texts == expected
    assert playground.message.value.startswith("done: 30 tokens, ")
    playground.seed.value = "6"
    write(playground)
    assert playground.continuation.texts != expected
    playground.new_seed.value = True
    write(playground)
    chosen = playground.continuation
    assert playground.seed.value == str(chosen.settings.seed) != "6"
    playground.new_seed.value = False
    write(playground)
    assert playground.continuation is not chosen
    assert playground.continuation.texts == chosen.texts


def test_without_an_event_loop_a_click_returns_with_the_text(playground):
    playground.generate.click()
    assert playground.message.value.startswith("done: 30 tokens, ")
    assert not playground.generate.disabled


def test_values_are_read_when_the_button_is_clicked(playground, model):
    playground.prompt.value, playground.seed.value = "Then", "-12345678901234567890"
    playground.temperature.value, playground.top_k.value, playground.top_p.value = 0.5, 3, 0.9
    playground.tokens.value, playground.samples.value = 7, 3

    async def change() -> None:
        playground.prompt.value, playground.tokens.value = "too late", 50

    write(playground, change)
    assert playground.continuation.texts == generate_text(
        model, TOKENIZER, "Then", 7, 0.5, 3, 0.9, 3, seed=-12345678901234567890
    )
    assert len(playground.view.samples) == 3 and playground.view.prompt == "Then"


def test_stop_keeps_the_text_so_far_and_a_second_click_on_generate_starts_nothing(playground):
    playground.tokens.value = 100_000

    async def stop() -> None:
        assert playground.generate.disabled and not playground.stop_button.disabled
        task = playground._task
        playground.start()
        assert playground._task is task
        lengths = [0]
        while lengths[-1] < 50:  # tokens come one after another, and others have their turn
            lengths.append(len(playground.view.samples[0]) if playground.view.samples else 0)
            await asyncio.sleep(0)
        # How many tokens a slice has depends on the machine's load; the first is shown at once.
        assert 1 in lengths and lengths == sorted(lengths)
        playground.stop_button.click()

    write(playground, stop)
    assert not playground.generate.disabled and playground.stop_button.disabled
    one = playground.continuation
    assert 0 < one.n_tokens < 100_000 and one.state == "stopped"
    assert playground.message.value.startswith("stopped: ")
    whole = generate_text(playground._model, TOKENIZER, "Once upon a time",
                          **{**HOW, "max_new_tokens": one.n_tokens})  # fmt: skip
    assert one.texts == whole
    select(playground, 0, 0)
    assert "after the filters" in playground.detail.value
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    assert sum(one.shape[-1:] == (257,) for one in tensors) < 5  # no logits of earlier tokens


def test_a_text_can_be_stopped_before_it_begins(playground):
    async def stop() -> None:
        playground.stop_button.click()

    write(playground, stop)
    assert not playground.generate.disabled and playground.stop_button.disabled
    assert playground.continuation is None


@pytest.mark.parametrize("how", ["close", "view"])
def test_generating_ends_when_no_page_shows_it(playground, how):
    playground.tokens.value = 100_000
    hear = playground.view._handle_custom_msg
    for kind in ("opened", "opened", "closed"):  # seen at two places, then at one
        hear(kind, [])

    async def leave() -> None:
        await asyncio.sleep(0.05)
        assert playground.is_busy
        playground.close() if how == "close" else hear("closed", [])
        await asyncio.wait_for(playground._task, 10)
        assert len(asyncio.all_tasks()) == 1

    write(playground, leave)


def test_a_selected_token_is_explained_until_the_next_text(playground):
    select(playground, 0, 4)  # there is none yet
    write(playground)
    select(playground, 0, 4)
    token = playground.continuation.samples[0][4]
    assert playground.view.selected == [0, 4]
    assert f"{token.before:.4f} by the model" in playground.detail.value
    write(playground)
    assert playground.view.selected == [] and playground.detail.value.startswith("Click a token")


@pytest.mark.parametrize("prompt", ["", "\x1b[2J\x00 🙂 שלום \u202e" * 9])
def test_any_prompt_is_continued_and_shown_as_itself(playground, prompt):
    playground.prompt.value = prompt
    write(playground)
    assert "done: 30 tokens" in playground.message.value
    assert ("only its end is used" in playground.message.value) == (len(prompt) > 24)
    assert not {"\x1b", "\x00", "\u202e"} & set(playground.view.prompt)


def test_errors_are_shown_and_the_buttons_work_again(playground, monkeypatch):
    playground.seed.value = "seven"
    playground.generate.click()
    assert "the seed must be a whole number, not &#x27;seven&#x27;" in playground.message.value
    playground.seed.value = "7"
    monkeypatch.setattr(playground._model, "hidden_states", lambda *_: 1 / 0)
    write(playground)
    assert "role='alert'" in playground.message.value
    assert "ZeroDivisionError" in playground.message.value and not playground.generate.disabled
    monkeypatch.undo()
    write(playground)
    assert playground.message.value.startswith("done")
    select(playground, 0, 99)
    assert "IndexError" in playground.message.value
