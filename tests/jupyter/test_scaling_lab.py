"""The scaling lab without a browser: its numbers and its sliders."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from horovod_lm.analysis.scaling import Network, step
from horovod_lm.jupyter.widgets import scaling_lab
from horovod_lm.jupyter.widgets.scaling_lab import GPT2_SMALL, SLIDERS, ScalingLab, predict


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


def test_a_slider_changes_the_table_at_once_and_many_moves_are_drawn_once(monkeypatch):
    monkeypatch.setattr(scaling_lab, "DRAWING_DELAY", 0)

    async def move() -> None:
        lab = ScalingLab()
        assert lab.choices == GPT2_SMALL and set(lab.sliders) == {*SLIDERS, "overlap"}
        picture = lab.picture.value
        drawn, draw = [], lab.draw
        monkeypatch.setattr(lab, "draw", lambda: (drawn.append(lab.choices.workers), draw()))
        for workers in (1, 2, 4, 8, 16):
            lab.sliders["workers"].value = workers
        found = predict(lab.choices, lab.inside)
        assert all(value in lab.table.value for value in found.values()) and drawn == []
        await lab._task
        assert drawn == [16] and lab.picture.value != picture
        assert lab.choices == replace(GPT2_SMALL, workers=16)
        width, height = Image.open(io.BytesIO(bytes(lab.picture.value))).size
        assert width > 1000 and height > 300
        lab.sliders["workers"].value = 32
        lab.close()
        await asyncio.wait([lab._task])
        assert drawn == [16] and len(asyncio.all_tasks()) == 1

    asyncio.run(move())


@pytest.mark.parametrize("end", [0, -1])
def test_every_end_of_every_slider_can_be_predicted_and_all_of_them_drawn(end):
    def last(name: str, slider) -> float:
        if hasattr(slider, "options"):
            return slider.options[end]
        value = slider.max if end else slider.min
        return value if name == "overlap" else 10.0**value

    async def move() -> None:
        lab = ScalingLab()
        for name, slider in lab.sliders.items():
            slider.value = value = last(name, slider)
            assert slider.value == pytest.approx(value) and lab.message.value == "", name
        lab.draw()
        lab.close()

    asyncio.run(move())


def test_values_outside_a_slider_start_at_its_nearest_end():
    lab = ScalingLab(replace(GPT2_SMALL, workers=100, parameters=1e20, microseconds=0.0))
    assert (lab.choices.workers, lab.choices.parameters) == (128, 1e12)
    assert lab.choices.microseconds == pytest.approx(0.1)
