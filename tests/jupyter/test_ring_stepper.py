"""The ring stepper without a browser: its picture, its buttons, its errors, and its task."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from horovod_lm.analysis.ring import RingState, ring_allreduce
from horovod_lm.jupyter.plots import name_of_sum
from horovod_lm.jupyter.widgets import ring_stepper
from horovod_lm.jupyter.widgets.ring_stepper import RingStepper, describe_traffic, ring_svg

SVG = "{http://www.w3.org/2000/svg}"


def states(workers: int, numbers: int = 24) -> list[RingState]:
    return ring_allreduce([torch.ones(numbers)] * workers)


@pytest.mark.parametrize("workers", range(2, 9))
def test_the_picture_names_every_sum_and_message_and_keeps_within_its_frame(workers):
    for state in states(workers):
        root = ElementTree.fromstring(ring_svg(state))
        shown = [one.text for one in root.iter(f"{SVG}text")]
        for worker, row in enumerate(state.holds):
            assert f"worker {worker}" in shown
            for chunk, whose in enumerate(row):
                assert name_of_sum(whose, chunk, workers) in shown
        moving = sorted(text for text in shown if text.startswith("chunk "))
        assert moving == sorted(f"chunk {message.chunk}" for message in state.messages)
        _, _, width, height = map(float, root.get("viewBox").split())
        cells = root.findall(f"{SVG}rect[@rx]")
        assert len(cells) == workers**2 and root.get("role") == "img"
        for cell in cells:
            x, y = float(cell.get("x")), float(cell.get("y"))
            assert x >= 2 and x + float(cell.get("width")) <= width - 2
            assert y >= 2 and y + float(cell.get("height")) <= height - 2
            assert float(cell.get("height")) > 8
        assert sum(cell.get("stroke-width") == "2.5" for cell in cells) == len(state.messages)


def test_the_picture_has_a_text_for_screen_readers():
    first, *_, last = (ElementTree.fromstring(ring_svg(state)) for state in states(2))
    assert first.find(f"{SVG}title").text == "worker 0 holds 0, 0; worker 1 holds 1, 1"
    assert last.find(f"{SVG}title").text == "worker 0 holds all, all; worker 1 holds all, all"


def test_the_bytes_are_counted():
    assert "by each worker: 0 bytes, 0.00 times its 96;" in describe_traffic(states(4)[0], 24)
    assert describe_traffic(states(4)[-1], 24) == (
        "sent so far by each worker: 144 bytes, 1.50 times its 96;"
        " a single worker that gathers and broadcasts sends 288"
    )


def test_buttons_go_forward_and_back_and_stop_at_the_ends():
    stepper = RingStepper(workers=3)
    assert (stepper.step.value, stepper.step.max) == (0, 4)
    assert stepper.back.disabled and not stepper.forward.disabled
    stepper.forward.click()
    assert stepper.step.value == 1 and not stepper.back.disabled
    assert "step 1 of 4, reduce-scatter" in stepper.headline.value
    assert stepper.picture.value == ring_svg(stepper.states[1])
    for _ in range(9):
        stepper.forward.click()
    assert stepper.step.value == 4 and stepper.forward.disabled
    assert "1.33 times" in stepper.account.value
    stepper.back.click()
    assert stepper.step.value == 3
    stepper.step.value = 2  # the slider, as a hand or an arrow key moves it
    assert "step 2 of 4" in stepper.headline.value


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


def test_play_goes_to_the_end_and_is_ended_by_pause_by_other_workers_and_by_close(monkeypatch):
    monkeypatch.setattr(ring_stepper, "STEP_INTERVAL", 0.05)

    async def watch() -> None:
        stepper = RingStepper(workers=3)
        stepper.play.click()
        assert stepper.is_busy and stepper.play.description == "Pause"
        await asyncio.wait_for(stepper._task, 10)
        assert stepper.step.value == 4 and stepper.play.description == "Play"
        for end in (stepper.play.click, lambda: setattr(stepper.workers, "value", 4)):
            stepper.play.click()  # from the end, it starts again
            assert stepper.step.value == 0 and stepper.is_busy
            end()
            await asyncio.sleep(0.1)
            assert stepper.step.value == 0 and not stepper.is_busy
            assert stepper.play.description == "Play"
        stepper.play.click()
        stepper.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watch())
