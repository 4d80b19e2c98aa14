"""What holds for every widget: labels, shown errors, and what a page without a kernel shows."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable

import ipywidgets as widgets
import pytest
import torch
from PIL import Image

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.jupyter.widgets import ring_stepper
from horovod_lm.jupyter.widgets.attention_explorer import AttentionExplorer
from horovod_lm.jupyter.widgets.dashboard import Dashboard
from horovod_lm.jupyter.widgets.playground import Playground
from horovod_lm.jupyter.widgets.ring_stepper import RingStepper
from horovod_lm.jupyter.widgets.scaling_lab import ScalingLab
from horovod_lm.jupyter.widgets.widget_parts import Message, html_table
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.train import run_distributed_training
from horovod_lm.utils.config import config_from_dict, load_config


@pytest.fixture(scope="module")
def run_dir(tiny_project):
    config = load_config(tiny_project / "configs/tiny.yaml")
    return run_distributed_training(config, 0, 1, 0, run_name="widgets").run_dir


@pytest.fixture
def make(run_dir) -> Callable[[type], widgets.Widget]:
    torch.manual_seed(0)
    model, tokenizer = TransformerLM(257, 32, 4, 2, 64, 48), ByteTokenizer()
    makers = {
        AttentionExplorer: lambda: AttentionExplorer(model, tokenizer),
        Dashboard: lambda: Dashboard(run_dir),
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


def test_an_error_of_a_callback_is_shown_until_the_next_success(make, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no <ink>")

    stepper, lab = make(RingStepper), make(ScalingLab)
    with monkeypatch.context() as broken:
        broken.setattr(ring_stepper, "ring_svg", fail)
        broken.setattr(lab, "plot", fail)
        stepper.forward.click()
        lab.sliders["workers"].value = 8
        for widget in (stepper, lab):
            assert widget.message.value == "<b role='alert'>RuntimeError: no &lt;ink&gt;</b>"
    stepper.forward.click()
    lab.sliders["workers"].value = 16
    assert stepper.message.value == lab.message.value == "" and stepper.step.value == 2


def test_errors_of_tasks_are_shown_as_plain_text():
    message = Message()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no <ink>")

    async def work() -> None:
        await message.start(fail)

    asyncio.run(work())
    assert message.value == "<b role='alert'>RuntimeError: no &lt;ink&gt;</b>"


def test_a_table_shows_its_texts_as_themselves():
    table = html_table("'ranks'", ["a<b"], [["<script>alert(1)</script>"]])
    assert "<script>" not in table and "&lt;script&gt;" in table and "a&lt;b" in table
    assert "aria-label='&#x27;ranks&#x27;'" in table
