"""The scaling lab without a browser: its numbers, its words, and its sliders."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from horovod_lm.analysis.scaling import Network, step
from horovod_lm.jupyter.widgets import scaling_lab
from horovod_lm.jupyter.widgets.scaling_lab import (
    GPT2_SMALL,
    SLIDERS,
    ScalingLab,
    explain,
    predict,
)


def test_a_prediction_is_the_cost_model_s():
    # 6 operations for each parameter and token; 16 sequences of 512 tokens; 50 TFLOP/s.
    assert GPT2_SMALL.job.seconds_per_step == pytest.approx(6 * 124e6 * 512 * 16 / 50e12)
    network = GPT2_SMALL.network
    assert (network.latency, network.bandwidth) == (pytest.approx(20e-6), 1.25e9)
    choices, inside = replace(GPT2_SMALL, gigabits_per_second=100), Network(1e-5, 1e10)
    found = step(choices.job, choices.network, 64, 4, inside)
    assert predict(choices, inside) == {
        "step": f"{1000 * found.seconds:.1f} ms",
        "arithmetic": "121.9 ms",
        "allreduce": f"{1000 * found.communication:.1f} ms",
        "not overlapped": f"{1000 * found.exposed:.1f} ms",
        "efficiency": f"{found.efficiency:.1%}",
        "all workers": f"{64 * 16 * 512 / found.seconds:,.0f} tokens/s",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "From 5 workers on, efficiency is below 90%"),
        ({"gigabits_per_second": 10_000, "microseconds": 0}, "at least 90% for any number"),
        ({"workers": 1}, "One worker does not communicate."),
        ({"workers": 4}, "nothing crosses the network"),
        ({"overlap": 0}, "Without overlap, no batch size hides the communication"),
        ({"batch": 1024}, "at 1,024 it does."),
        ({"batch": 1}, "at 1 it does not."),
        ({}, "Bandwidth takes 100% of the allreduce"),
        ({"parameters": 1e5, "workers": 4096, "microseconds": 1000}, "Latency takes"),
    ],
)
def test_where_it_breaks_is_said_in_words(changes, said):
    assert any(said in one for one in explain(replace(GPT2_SMALL, **changes)))


def test_a_slider_changes_the_table_the_words_and_the_picture():
    lab = ScalingLab()
    assert lab.choices == GPT2_SMALL and set(lab.sliders) == {*SLIDERS, "overlap"}
    assert not any(slider.continuous_update for slider in lab.sliders.values())
    before = lab.table.value, lab.words.value, lab.picture.value
    lab.sliders["gigabits_per_second"].value = 1000.0
    after = lab.table.value, lab.words.value, lab.picture.value
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert lab.choices == replace(GPT2_SMALL, gigabits_per_second=1000.0)
    assert all(value in lab.table.value for value in predict(lab.choices).values())
    width, height = Image.open(io.BytesIO(bytes(lab.picture.value))).size
    assert width > 1000 and height > 300


def test_every_end_of_every_slider_can_be_predicted_and_all_of_them_drawn(monkeypatch):
    lab = ScalingLab()
    draw = lab.draw
    monkeypatch.setattr(lab, "draw", lambda: None)
    monkeypatch.setattr(scaling_lab, "DRAWING_DELAY", 0)
    for end in (0, -1):
        for name, slider in lab.sliders.items():
            if hasattr(slider, "options"):
                value = slider.options[end]
            else:
                value = slider.max if end else slider.min
                value = value if name == "overlap" else 10.0**value
            slider.value = value
            assert slider.value == pytest.approx(value) and lab.message.value == "", name
        draw()  # with every slider at this end


def test_values_outside_a_slider_start_at_its_nearest_end():
    lab = ScalingLab(replace(GPT2_SMALL, workers=100, parameters=1e20, microseconds=0.0))
    assert (lab.choices.workers, lab.choices.parameters) == (128, 1e12)
    assert lab.choices.microseconds == pytest.approx(0.1)


def test_many_moves_are_drawn_once_and_closing_leaves_no_task(monkeypatch):
    async def move() -> int:
        lab, drawn = ScalingLab(), []
        monkeypatch.setattr(lab, "draw", lambda: drawn.append(lab.choices.workers))
        for workers in (1, 2, 4, 8, 16):
            lab.sliders["workers"].value = workers
        assert drawn == [] and "With 16 workers" in lab.words.value
        await asyncio.sleep(0.2)
        assert drawn == [16]
        lab.sliders["workers"].value = 32
        lab.close()
        await asyncio.sleep(0.2)
        assert drawn == [16]
        return len(asyncio.all_tasks())

    assert asyncio.run(move()) == 1  # the test's own
