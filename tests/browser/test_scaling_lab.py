"""The scaling lab in a real browser: a slider is moved with the keyboard, and all of it follows."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT

OPEN = """
from horovod_lm.jupyter.widgets.scaling_lab import Choices, ScalingLab, read_measurements
rows = read_measurements("PATH", megabits_per_second=400)
tiny = Choices(
    parameters=3e5, batch=64, workers=64, workers_per_host=1, gigabits_per_second=0.45,
    microseconds=100, teraflops=0.05, tokens_per_sequence=96)
lab = ScalingLab(tiny, rows)
"""


@pytest.fixture
def opened(open_notebook):
    table = ROOT / "tests" / "benchmarks" / "allreduce_over_links.csv"

    def open_lab():
        page = open_notebook(OPEN.replace("PATH", str(table)) + "lab")
        page.run_all()
        page.wait_for("efficiency is")
        page.page.wait_for_function(
            "() => document.querySelector('.jp-OutputArea-output img')?.naturalWidth > 1000"
        )
        return page

    return open_lab


def slider(page, name: str):
    """The handle of a slider, by what is written beside it."""
    label = page.page.get_by_text(name, exact=True)
    return page.page.locator(".widget-inline-hbox").filter(has=label).locator(".noUi-handle")


def picture(page) -> str:
    return page.page.locator(".jp-OutputArea-output img").get_attribute("src")


def test_a_slider_is_moved_with_the_keyboard_and_everything_follows(opened):
    page = opened()
    drawn, said = picture(page), page.outputs()[0]
    assert "With 64 workers" in said
    slider(page, "workers").press("ArrowRight")
    page.wait_for("With 128 workers")
    page.page.wait_for_function(
        "old => document.querySelector('.jp-OutputArea-output img').src !== old", arg=drawn
    )
    drawn, said = picture(page), page.outputs()[0]
    slider(page, "bandwidth of a node (Gbit/s)").press("ArrowRight")
    page.page.wait_for_function(
        "old => document.querySelector('.jp-OutputArea-output img').src !== old", arg=drawn
    )
    assert page.outputs()[0] != said
    page.screenshot("scaling_lab")
    assert page.complaints == []
