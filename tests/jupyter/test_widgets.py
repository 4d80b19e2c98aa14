"""What holds for every widget, and the parts that they share."""

from __future__ import annotations

import asyncio
import base64
import io
import unicodedata
from collections.abc import Callable

import ipywidgets as widgets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from horovod_lm.data.tokenizers import ByteTokenizer, train_bpe
from horovod_lm.jupyter.widgets import ring_stepper
from horovod_lm.jupyter.widgets.attention_explorer import AttentionExplorer
from horovod_lm.jupyter.widgets.dashboard import Dashboard
from horovod_lm.jupyter.widgets.playground import Playground
from horovod_lm.jupyter.widgets.ring_stepper import RingStepper
from horovod_lm.jupyter.widgets.scaling_lab import ScalingLab
from horovod_lm.jupyter.widgets.widget_parts import (
    BaseWidget,
    html_table,
    visible,
    visible_token,
)
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import config_from_dict


@pytest.fixture
def make(past_run) -> Callable[[type], widgets.Widget]:
    torch.manual_seed(0)
    model, tokenizer = TransformerLM(257, 32, 4, 2, 64, 48), ByteTokenizer()
    makers = {
        AttentionExplorer: lambda: AttentionExplorer(model, tokenizer),
        Dashboard: lambda: Dashboard(past_run),
        Playground: lambda: Playground(model, tokenizer, config_from_dict({})),
        RingStepper: RingStepper,
        ScalingLab: ScalingLab,
    }
    return lambda kind: makers[kind]()


ALL = pytest.mark.parametrize(
    "kind", [AttentionExplorer, Dashboard, Playground, RingStepper, ScalingLab]
)


@ALL
def test_a_page_without_a_kernel_shows_the_same_at_every_execution(make, kind):
    first, second = make(kind)._repr_mimebundle_(), make(kind)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in first
    assert first["text/plain"] == second["text/plain"] and " at 0x" not in first["text/plain"]
    if kind in (Dashboard, RingStepper):
        assert first["image/png"] == second["image/png"]
        assert Image.open(io.BytesIO(base64.b64decode(first["image/png"]))).width > 800


@ALL
def test_inputs_are_labelled_and_buttons_explained(make, kind):
    def parts(widget: widgets.Widget) -> list[widgets.Widget]:
        return [widget, *(p for child in getattr(widget, "children", ()) for p in parts(child))]

    for part in parts(make(kind)):
        if isinstance(part, widgets.Button):
            assert part.description and part.tooltip
        elif isinstance(part, widgets.Checkbox):
            assert part.description
        elif hasattr(part, "value") and not isinstance(
            part, (widgets.HTML, widgets.Image, widgets.IntProgress)
        ):
            assert part.description and part.style.description_width in ("initial", "18em")


NO_INK = "<b role='alert'>RuntimeError: no &lt;ink&gt;</b>"


def fail(*_: object) -> None:
    raise RuntimeError("no <ink>")


def test_an_error_of_a_callback_is_shown_until_the_next_success(make, monkeypatch):
    stepper, lab = make(RingStepper), make(ScalingLab)
    with monkeypatch.context() as broken:
        broken.setattr(ring_stepper, "ring_svg", fail)
        broken.setattr(lab, "plot", fail)
        stepper.forward.click()
        lab.sliders["workers"].value = 8
        assert stepper.message.value == lab.message.value == NO_INK
    stepper.forward.click()
    lab.sliders["workers"].value = 16
    assert stepper.message.value == lab.message.value == "" and stepper.step.value == 2


def test_an_error_of_a_task_is_shown_and_its_end_is_told():
    async def work() -> None:
        fail()

    async def run() -> None:
        widget, ends = BaseWidget(), []
        widget.start_task(work, at_end=lambda: ends.append(widget.is_busy))
        assert widget.is_busy
        await widget._task
        await asyncio.sleep(0)
        assert widget.message.value == NO_INK and ends == [False]

    asyncio.run(run())


def test_a_table_shows_its_texts_as_themselves():
    table = html_table("'ranks'", ["a<b"], [["<script>alert(1)</script>"]])
    assert "<script>" not in table and "&lt;script&gt;" in table and "a&lt;b" in table
    assert "aria-label='&#x27;ranks&#x27;'" in table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>&amp;", "<b>&amp;"),
        ("a\x1b[2J\x00\x7f", "a␛[2J␀␡"),
        ("one\ntwo\tthree\r", "one↵\ntwo⇥\tthree␍"),
        ("\u202eabc\u2066", "⟨U+202E⟩abc⟨U+2066⟩"),
        ("\u00a0\u200b\ufeff\x9b", "⟨U+00A0⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+009B⟩"),
        ("\u0301e", "◌\u0301e"),
        ("e\u0301", "e\u0301"),
        ("🙂 שלום 日本", "🙂 שלום 日本"),
        ("a\ud800b", "a⟨U+D800⟩b"),
        ("", ""),
    ],
)
def test_text_is_shown_with_every_character_visible(text, shown):
    assert visible(text) == shown


@settings(deadline=None)
@given(st.text())
def test_no_control_character_is_ever_shown_raw(text):
    for character in visible(text):
        category = unicodedata.category(character)
        assert category not in ("Cf", "Cs", "Cn", "Co", "Zl", "Zp")
        assert category != "Cc" or character in "\n\t"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["שלום 🙂🙂🙂"], 290)], ids=repr)
def test_a_token_that_is_no_whole_character_is_shown_as_its_bytes(tokenizer):
    shown = [visible_token(tokenizer, token) for token in tokenizer.encode("a\x1b€")]
    assert shown == ["a", "␛", "⟨E2⟩", "⟨82⟩", "⟨AC⟩"]
    assert visible_token(tokenizer, tokenizer.eot_id) == "<|endoftext|>"
    assert visible_token(tokenizer, 99_999) == "\N{REPLACEMENT CHARACTER}"
