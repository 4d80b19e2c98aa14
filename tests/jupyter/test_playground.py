"""The playground without a browser: what its buttons, its tokens and its errors do."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
import torch

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generate import generate_text
from horovod_lm.jupyter.widgets.playground import Playground
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import config_from_dict

SIZES = {"vocab_size": 257, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 64,
         "max_seq_len": 48, "dropout": 0.0, "pad_token_id": 256}  # fmt: skip
HOW = {"max_new_tokens": 30, "temperature": 1.2, "top_k": 40, "top_p": 0.95, "seed": 5}
CONFIG = config_from_dict({"model": SIZES, "generation": HOW})
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(**SIZES)
    with torch.no_grad():
        model.token_embedding.weight[256] = 0.0  # it hardly ever ends by itself
    return model.eval()


@pytest.fixture
def playground(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Playground(model, TOKENIZER, CONFIG)
    yield made
    made.close()


def write(playground: Playground, during=None) -> None:
    """Click Generate and let the event loop work until the text is there."""

    async def work() -> None:
        playground.generate.click()
        if during is not None:
            await during()
        while playground.is_writing:
            await asyncio.sleep(0.001)

    asyncio.run(work())


def hear(playground: Playground, **content) -> None:
    """Receive a message as from the browser."""
    part = playground.view if content["kind"] == "select" else playground._tracker
    part._handle_custom_msg(content, [])


def shown(playground: Playground) -> list[str]:
    return ["".join(text for text, *_ in sample) for sample in playground.view.samples]


def test_the_same_seed_writes_what_generate_text_writes(playground, model):
    write(playground)
    expected = generate_text(model, TOKENIZER, "Once upon a time", **HOW)
    assert playground.history[0].texts == expected
    assert playground.message.value.startswith("done: 30 tokens, ")
    write(playground)
    assert playground.history[1].texts == expected
    playground.seed.value = "6"
    write(playground)
    assert playground.history[2].texts != expected


def test_values_are_read_when_the_button_is_clicked(playground, model):
    playground.prompt.value, playground.seed.value = "Then", "-12345678901234567890"
    playground.temperature.value, playground.top_k.value, playground.top_p.value = 0.5, 3, 0.9
    playground.tokens.value, playground.samples.value = 7, 3

    async def change() -> None:
        playground.prompt.value, playground.tokens.value = "too late", 50

    write(playground, change)
    [one] = playground.history
    assert one.texts == generate_text(
        model, TOKENIZER, "Then", 7, 0.5, 3, 0.9, 3, seed=-12345678901234567890
    )
    assert len(playground.view.samples) == 3 and playground.view.prompt == "Then"


def test_a_new_seed_each_time_is_shown_and_repeats_the_text(playground):
    playground.new_seed.value = True
    write(playground), write(playground)
    first, second = playground.history
    assert first.texts != second.texts and playground.seed.value == str(second.settings.seed)
    playground.new_seed.value = False
    write(playground)
    assert playground.history[2].texts == second.texts


def test_tokens_come_one_after_another_and_others_have_their_turn(playground):
    playground.tokens.value = 2000
    lengths, turns = [], []

    async def watch() -> None:
        while playground.is_writing:
            lengths.append(len(shown(playground)[0]) if playground.view.samples else 0)
            turns.append(time.perf_counter())
            await asyncio.sleep(0)

    write(playground, watch)
    assert len(set(lengths)) > 4 and lengths == sorted(lengths) and 1 in lengths
    gaps = sorted(after - before for before, after in zip(turns, turns[1:], strict=False))
    assert gaps[len(gaps) // 2] < 0.2


def test_stop_keeps_what_is_there(playground):
    playground.tokens.value = 100_000

    async def stop() -> None:
        assert playground.generate.disabled and not playground.stop_button.disabled
        while not playground.view.samples or len(shown(playground)[0]) < 50:
            await asyncio.sleep(0)
        playground.stop_button.click()

    write(playground, stop)
    assert not playground.generate.disabled and playground.stop_button.disabled
    [one] = playground.history
    assert 0 < one.n_tokens < 100_000 and one.state == "stopped"
    assert playground.message.value.startswith("stopped: ")
    whole = generate_text(playground._model, TOKENIZER, "Once upon a time",
                          **{**HOW, "max_new_tokens": one.n_tokens})  # fmt: skip
    assert one.texts == whole
    hear(playground, kind="select", sample=0, index=0)
    assert "after the filters" in playground.detail.value
    assert rows_of_logits() < 5


def rows_of_logits() -> int:
    """Count the tensors that hold a value for each of the 257 tokens."""
    found = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum(one.shape[-1:] == (257,) for one in found)


def test_a_text_can_be_stopped_before_it_begins(playground):
    async def stop() -> None:
        playground.stop_button.click()

    write(playground, stop)
    assert not playground.generate.disabled and playground.stop_button.disabled
    assert playground.history == []


def test_a_second_click_while_it_writes_begins_nothing(playground):
    async def click() -> None:
        task = playground._task
        playground.start()
        assert playground._task is task

    write(playground, click)
    assert len(playground.history) == 1


@pytest.mark.parametrize("how", ["close", "view"])
def test_nothing_goes_on_when_nobody_sees_it(playground, how):
    playground.tokens.value = 100_000
    for kind in ("opened", "opened", "closed"):  # seen at two places, then at one
        hear(playground, kind=kind)

    async def leave() -> None:
        await asyncio.sleep(0.05)
        assert playground.is_writing
        playground.close() if how == "close" else hear(playground, kind="closed")
        await asyncio.wait_for(playground._task, 10)
        assert len(asyncio.all_tasks()) == 1

    write(playground, leave)
    assert playground._model.training is False


def test_any_token_is_selected(playground):
    hear(playground, kind="select", sample=0, index=4)  # there is none yet
    write(playground)
    hear(playground, kind="select", sample=0, index=4)
    token = playground.history[0].samples[0][4]
    assert playground.view.selected == [0, 4]
    assert f"{token.before:.4f} by the model" in playground.detail.value
    write(playground)
    assert playground.view.selected == []


def test_settings_are_compared_and_an_older_text_is_looked_at_again(playground):
    write(playground)
    playground.temperature.value = 0.0
    write(playground)
    first, second = shown(playground)[0], playground.history[0]
    playground.past.value = (0, 1)
    assert "temperature 1.2" in playground.comparison.value
    assert "temperature 0," in playground.comparison.value
    playground.past.value = (0,)
    assert playground.comparison.value == "" and shown(playground)[0] != first
    hear(playground, kind="select", sample=0, index=2)
    assert f"{second.samples[0][2].before:.4f}" in playground.detail.value


@pytest.mark.parametrize("prompt", ["", "<b>&amp;</b>", "\x1b[2J\x00", "🙂 שלום \u202e", "x" * 500])
def test_any_prompt_is_continued_and_shown_as_itself(playground, model, prompt):
    playground.prompt.value = prompt
    write(playground)
    assert "done: 30 tokens" in playground.message.value
    assert ("only its end is used" in playground.message.value) == (len(prompt) > 48)
    assert "\x1b" not in playground.view.prompt and "\u202e" not in playground.view.prompt


def test_errors_are_shown_and_the_buttons_work_again(playground, monkeypatch):
    playground.seed.value = "seven"
    playground.generate.click()
    assert "the seed must be a whole number, not &#x27;seven&#x27;" in playground.message.value
    playground.seed.value = "7"
    monkeypatch.setattr(playground._model, "hidden_states", lambda *_: 1 / 0)
    write(playground)
    assert (
        "ZeroDivisionError" in playground.message.value
        and "role='alert'" in playground.message.value
    )
    assert not playground.generate.disabled
    hear(playground, kind="select", sample=0, index=99)
    monkeypatch.undo()
    write(playground)
    assert playground.message.value.startswith("done")
    hear(playground, kind="select", sample=0, index=99)
    assert "IndexError" in playground.message.value


# ---- the contract's name -------------------------------------------------------------------------


def test_in_a_kernel_the_contract_s_call_is_the_playground(kernel):
    kernel.run("import torch\nfrom horovod_lm.generate import interactive_generation\n"
               "from horovod_lm.data.tokenizers import ByteTokenizer\n"
               "from horovod_lm.models.transformer_lm import TransformerLM\n"
               "from horovod_lm.utils.config import config_from_dict\n"
               "model = TransformerLM(257, 32, 4, 2, 64, 48)")  # fmt: skip
    seen = []
    kernel.start("interactive_generation(model=model, tokenizer=ByteTokenizer(), "
                 "config=config_from_dict({}), device='cpu')")  # fmt: skip
    while True:
        message = kernel.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != kernel.request:
            continue
        if message["msg_type"] == "display_data":
            seen.append(message["content"]["data"])
        if message["content"].get("execution_state") == "idle":
            break
    widget, line = seen
    assert "application/vnd.jupyter.widget-view+json" in widget
    assert widget["text/plain"].startswith("playground: a model of ")
    assert "It needs a kernel" in line["text/plain"]
