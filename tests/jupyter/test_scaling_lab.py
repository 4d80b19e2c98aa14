"""The scaling lab without a browser: its numbers, its words, and its sliders."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from horovod_lm.analysis.scaling import Measurement, Network, fit_network, step
from horovod_lm.jupyter.widgets.scaling_lab import (
    SLIDERS,
    Choices,
    ScalingLab,
    explain,
    predict,
    read_measurements,
)
from horovod_lm.utils.errors import UserError
from tests.conftest import ROOT

MEASURED = ROOT / "tests" / "benchmarks" / "allreduce_over_links.csv"
GPT2 = Choices()


def test_a_prediction_is_the_cost_model_s():
    # 6 operations for each parameter and token; 16 sequences of 512 tokens; 50 TFLOP/s.
    assert GPT2.job.seconds_per_step == pytest.approx(6 * 124e6 * 512 * 16 / 50e12)
    assert GPT2.network.latency == pytest.approx(20e-6) and GPT2.network.bandwidth == 1.25e9
    choices, inside = replace(GPT2, gigabits_per_second=100), Network(1e-5, 1e10)
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
    choices = replace(GPT2, **changes)
    assert any(said in one for one in explain(choices))


def test_measured_links_give_back_the_rate_that_they_were_set_to():
    for megabits in (20, 100, 400):
        rows = read_measurements(MEASURED, megabits)
        assert fit_network(rows).bandwidth * 8 / 1e6 == pytest.approx(megabits, rel=0.15)
    # Short messages pass a shaped link before it holds them back: they would hide its rate.
    everything = read_measurements(MEASURED, 100, smallest=0)
    assert {row.workers for row in everything} == {2, 3} and len(everything) > len(rows)
    assert fit_network(everything).bandwidth * 8 / 1e6 > 150


def test_a_table_without_the_bandwidth_names_those_that_it_has():
    with pytest.raises(UserError, match="no allreduce at 99 Mbit/s: choose one of 20, 100, 400"):
        read_measurements(MEASURED, 99)


def test_a_slider_changes_the_table_the_words_and_the_picture():
    lab = ScalingLab()
    before = lab.table.value, lab.words.value, lab.picture.value
    lab.sliders["gigabits_per_second"].value = 1000.0
    after = lab.table.value, lab.words.value, lab.picture.value
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert lab.choices == replace(GPT2, gigabits_per_second=1000.0)
    assert all(value in lab.table.value for value in predict(lab.choices).values())
    width, height = Image.open(io.BytesIO(bytes(lab.picture.value))).size
    assert width > 1000 and height > 300


def test_every_choice_has_a_labelled_slider_that_waits_for_its_end():
    lab = ScalingLab()
    assert set(lab.sliders) == {*SLIDERS, "overlap"}
    for slider in lab.sliders.values():
        assert slider.description and not slider.continuous_update
    assert lab.choices == GPT2


def test_every_end_of_every_slider_can_be_predicted_and_drawn():
    lab = ScalingLab(measurements=read_measurements(MEASURED, 100))
    for name, slider in lab.sliders.items():
        start = slider.value
        if name in ("batch", "workers", "workers_per_host"):
            ends = slider.options[0], slider.options[-1]
        elif name == "overlap":
            ends = 0.0, 1.0
        else:
            ends = 10.0**slider.min, 10.0**slider.max
        for end in ends:
            slider.value = end
            assert slider.value == pytest.approx(end) and lab.message.value == "", name
        slider.value = start


def test_with_measurements_it_starts_at_the_network_that_fits_them():
    rows = read_measurements(MEASURED, 400)
    lab = ScalingLab(measurements=rows)
    fitted = fit_network(rows)
    assert lab.choices.network.bandwidth == pytest.approx(fitted.bandwidth)
    drawn = [text.get_text() for text in lab.plot().axes[2].get_legend().get_texts()]
    assert {"2 nodes", "3 nodes"} <= set(drawn)


@pytest.mark.filterwarnings("error")  # a widget that was never finished is closed all the same
def test_measurements_that_leave_the_network_open_are_refused():
    with pytest.raises(ValueError, match="at least two sizes"):
        ScalingLab(measurements=[Measurement(1e6, 2, 0.1)])


def test_values_outside_a_slider_start_at_its_nearest_end():
    lab = ScalingLab(replace(GPT2, workers=100, parameters=1e20, microseconds=0.0))
    assert (lab.choices.workers, lab.choices.parameters) == (128, 1e12)
    assert lab.choices.microseconds == pytest.approx(0.1)


def test_many_moves_are_drawn_once_and_closing_leaves_no_task(monkeypatch):
    async def move() -> int:
        lab, drawn = ScalingLab(), []
        monkeypatch.setattr(lab, "draw", lambda: drawn.append(lab.choices.workers))
        for workers in (1, 2, 4, 8, 16):
            lab.sliders["workers"].value = workers
        assert drawn == [] and f"With {16} workers" in lab.words.value
        await asyncio.sleep(0.3)
        assert drawn == [16]
        lab.sliders["workers"].value = 32
        lab.close()
        await asyncio.sleep(0.3)
        assert drawn == [16]
        return len(asyncio.all_tasks())

    assert asyncio.run(move()) == 1  # the test's own
