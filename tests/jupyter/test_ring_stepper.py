"""The ring stepper without a browser: what it shows, its buttons, its errors, what it leaves."""

from __future__ import annotations

import asyncio
import base64
import io
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from horovod_lm.jupyter import ring_stepper
from horovod_lm.jupyter.plots.ring import name_of_sum
from horovod_lm.jupyter.ring_picture import describe, ring_svg
from horovod_lm.jupyter.ring_stepper import RingStepper, account, headline
from horovod_lm.ring import RingState, ring_allreduce
from horovod_lm.utils.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def states(workers: int, numbers: int = 24) -> list[RingState]:
    return ring_allreduce([torch.ones(numbers)] * workers)


def texts(svg: str) -> list[str]:
    return [one.text for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# ---- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", range(1, 9))
def test_the_picture_of_every_state_names_every_sum_and_every_chunk_on_its_way(workers):
    for state in states(workers):
        shown = texts(ring_svg(state))
        for worker, row in enumerate(state.holds):
            assert f"worker {worker}" in shown
            for chunk, whose in enumerate(row):
                assert name_of_sum(whose, chunk, workers) in shown
        moving = sorted(text for text in shown if text.startswith("chunk "))
        assert moving == sorted(f"chunk {message.chunk}" for message in state.messages)


@pytest.mark.parametrize("workers", range(2, 9))
def test_the_picture_keeps_within_its_frame_and_frames_what_has_arrived(workers):
    for state in states(workers):
        root = ElementTree.fromstring(ring_svg(state))
        _, _, width, height = map(float, root.get("viewBox").split())
        cells = list(root.iter(f"{SVG}rect"))
        assert len(cells) == workers**2
        for cell in cells:
            x, y = float(cell.get("x")), float(cell.get("y"))
            assert x >= 2 and x + float(cell.get("width")) <= width - 2
            assert y >= 2 and y + float(cell.get("height")) <= height - 2
            assert float(cell.get("height")) > 8
        assert sum(cell.get("stroke-width") == "2.5" for cell in cells) == len(state.messages)
        assert root.get("role") == "img" and root.find(f"{SVG}title").text == describe(state)


def test_the_picture_takes_its_colours_from_the_theme():
    svg = ring_svg(states(4)[2])
    assert "--jp-ui-font-color1" in svg and "--jp-brand-color1" in svg
    assert 'fill="black"' not in svg and 'fill="white"' not in svg


def test_words_say_what_the_picture_shows():
    first, *_, last = states(2)
    assert describe(first) == "worker 0 holds 0, 0; worker 1 holds 1, 1"
    assert describe(last) == "worker 0 holds all, all; worker 1 holds all, all"
    assert headline(first, 2).startswith("start: ")
    assert headline(last, 2).startswith("step 2 of 2, allgather: ")


def test_the_account_counts_bytes():
    assert account(states(4)[0], 24).startswith(
        "sent so far by each worker: 0 bytes, 0.00 times its 96;"
    )
    assert account(states(4)[-1], 24) == (
        "sent so far by each worker: 144 bytes, 1.50 times its 96;"
        " a single worker that gathers and broadcasts sends 288"
    )


# ---- the widget ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("control", "value"), [("workers", 6), ("workers", 2), ("numbers", 7)])
def test_other_workers_or_numbers_start_again(control, value):
    stepper = RingStepper(workers=4)
    stepper.step.value = 6
    getattr(stepper, control).value = value
    assert stepper.step.value == 0
    assert stepper.step.max == 2 * (stepper.workers.value - 1)
    assert stepper.state.workers == stepper.workers.value
    assert f"times its {4 * stepper.numbers.value}" in stepper.account.value
    assert stepper.message.value == ""


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"workers": 1}, r"RingStepper\(workers=1\): workers must be 2 to 8"),
        ({"workers": 9}, r"RingStepper\(workers=9\): workers must be 2 to 8"),
        ({"numbers": 0}, r"RingStepper\(numbers=0\): numbers must be 1 to 1,000,000"),
    ],
)
def test_impossible_sizes_are_one_sentence(sizes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RingStepper(**sizes)


def test_an_error_in_a_callback_is_shown_and_goes_with_the_next_success(monkeypatch):
    stepper = RingStepper()

    def fail(state: RingState) -> str:
        raise RuntimeError("no <ink>")

    with monkeypatch.context() as broken:
        broken.setattr(ring_stepper, "ring_svg", fail)
        stepper.forward.click()
        assert stepper.message.value == "<b role='alert'>RuntimeError: no &lt;ink&gt;</b>"
    stepper.forward.click()
    assert stepper.message.value == "" and stepper.step.value == 2


def test_controls_are_labelled_and_nothing_is_cut_off():
    stepper = RingStepper()
    for control in (stepper.workers, stepper.numbers, stepper.step):
        assert control.description and control.style.description_width == "initial"
    for button in (stepper.back, stepper.forward, stepper.play):
        assert button.description and button.tooltip


def test_without_a_kernel_all_steps_are_there_as_a_picture():
    stepper = RingStepper(workers=4)
    bundle = stepper._repr_mimebundle_()
    assert (
        bundle["text/plain"].startswith("figure: ")
        and "after each of 6 steps" in (bundle["text/plain"])
    )
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.width > 800 and "application/vnd.jupyter.widget-view+json" in bundle
    assert RingStepper(workers=4)._repr_mimebundle_()["image/png"] == bundle["image/png"]


# ---- playing -------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(ring_stepper, "SECONDS_BETWEEN_STEPS", 0.05)


def test_play_goes_to_the_end_and_leaves_no_task(quick):
    async def watch() -> None:
        stepper = RingStepper(workers=3)
        stepper.play.click()
        assert stepper.is_playing and stepper.play.description == "Pause"
        await asyncio.wait_for(stepper._task, 10)
        assert stepper.step.value == 4 and stepper.play.description == "Play"
        assert asyncio.all_tasks() == {asyncio.current_task()}
        stepper.play.click()  # from the end, it starts again
        assert stepper.step.value == 0 and stepper.is_playing
        stepper.play.click()
        await asyncio.sleep(0.2)
        assert stepper.step.value == 0 and not stepper.is_playing
        assert stepper.play.description == "Play"

    asyncio.run(watch())


def test_closing_the_view_or_changing_the_ring_ends_the_playing(quick):
    async def watch() -> None:
        stepper = RingStepper(workers=8)
        stepper.play.click()
        stepper.workers.value = 3
        await asyncio.sleep(0.2)
        assert stepper.step.value == 0 and not stepper.is_playing
        stepper.play.click()
        stepper.close()
        await asyncio.sleep(0.2)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watch())
