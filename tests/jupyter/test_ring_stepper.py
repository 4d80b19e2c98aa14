"""The ring stepper without a browser: its picture and its controls."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from horovod_lm.analysis.ring import RingState, ring_allreduce
from horovod_lm.jupyter.plots import name_of_sum
from horovod_lm.jupyter.widgets.ring_stepper import RingStepper, ring_svg

SVG = "{http://www.w3.org/2000/svg}"


def states(workers: int) -> list[RingState]:
    return ring_allreduce([torch.ones(24)] * workers)


@pytest.mark.parametrize("workers", range(2, 9))
def test_the_picture_names_every_sum_and_every_message(workers):
    for state in states(workers):
        root = ElementTree.fromstring(ring_svg(state))
        shown = [one.text for one in root.iter(f"{SVG}text")]
        for worker, row in enumerate(state.holds):
            assert f"worker {worker}" in shown
            for chunk, whose in enumerate(row):
                assert name_of_sum(whose, chunk, workers) in shown
        moving = sorted(text for text in shown if text.startswith("chunk "))
        assert moving == sorted(f"chunk {message.chunk}" for message in state.messages)
        cells = root.findall(f"{SVG}g")
        assert len(cells) == workers**2 and root.get("role") == "img"
        assert sum(cell.get("font-weight") == "bold" for cell in cells) == len(state.messages)


def test_the_picture_has_a_text_for_screen_readers():
    first, *_, last = (ElementTree.fromstring(ring_svg(state)) for state in states(2))
    assert first.find(f"{SVG}title").text == "worker 0 holds 0, 0; worker 1 holds 1, 1"
    assert last.find(f"{SVG}title").text == "worker 0 holds all, all; worker 1 holds all, all"


def test_the_slider_shows_a_step_and_counts_the_bytes():
    stepper = RingStepper()
    assert (stepper.step.value, stepper.step.max) == (0, 6)
    assert "by each worker: 0 bytes, 0.00 times its 96;" in stepper.account.value
    stepper.step.value = 1
    assert "step 1 of 6, reduce-scatter" in stepper.headline.value
    assert stepper.picture.value == ring_svg(stepper.states[1])
    stepper.step.value = 6
    assert stepper.account.value == (
        "sent so far by each worker: 144 bytes, 1.50 times its 96;"
        " a single worker that gathers and broadcasts sends 288"
    )


@pytest.mark.parametrize(("control", "value"), [("workers", 2), ("numbers", 7)])
def test_other_workers_or_numbers_start_again(control, value):
    stepper = RingStepper(workers=9, numbers=0)
    assert (stepper.workers.value, stepper.numbers.value, stepper.step.max) == (8, 1, 14)
    stepper.step.value = 6
    getattr(stepper, control).value = value
    assert (stepper.step.value, stepper.step.max) == (0, 2 * (stepper.workers.value - 1))
    assert stepper.states[0].workers == stepper.workers.value
    assert f"times its {4 * stepper.numbers.value}" in stepper.account.value
    assert stepper.message.value == ""
