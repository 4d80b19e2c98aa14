"""The scaling lab in a real browser: a slider is moved with the keyboard, and all of it follows."""

from __future__ import annotations

OPEN = """
from horovod_lm.jupyter.widgets.scaling_lab import ScalingLab
ScalingLab()
"""


def slider(page, name: str):
    """The handle of a slider, by what is written beside it."""
    label = page.page.get_by_text(name, exact=True)
    return page.page.locator(".widget-inline-hbox").filter(has=label).locator(".noUi-handle")


def test_a_slider_is_moved_with_the_keyboard_and_everything_follows(open_notebook):
    page = open_notebook(OPEN)
    page.run_all()
    page.wait_for("With 64 workers")
    drawn = page.picture()
    slider(page, "workers").press("ArrowRight")
    page.wait_for("With 128 workers")
    page.wait_for_another_picture(drawn)
    drawn, said = page.picture(), page.outputs()[0]
    slider(page, "bandwidth of a node (Gbit/s)").press("ArrowRight")
    page.wait_for_another_picture(drawn)
    assert page.outputs()[0] != said
    page.screenshot("scaling_lab")
    assert page.complaints == []
