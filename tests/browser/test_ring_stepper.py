"""The ring stepper in a real browser: by mouse and by keyboard."""

from __future__ import annotations

STEPPER = """
from horovod_lm.jupyter.widgets.ring_stepper import RingStepper
RingStepper(workers=4)
"""


def test_mouse_and_keyboard_move_it(lab, open_notebook):
    page = open_notebook(STEPPER)
    page.run_all()
    page.wait_for("start: each worker holds its own numbers")
    assert page.button("Back").is_disabled()
    page.button("Forward").click()
    page.wait_for("step 1 of 6, reduce-scatter")
    page.wait_for("24 bytes, 0.25 times its 96")
    drawn = page.page.locator(".jp-OutputArea-output svg[role=img]")
    assert {"3+0", "chunk 3"} <= set(drawn.locator("text").all_text_contents())
    page.button("Forward").click()
    page.wait_for("step 2 of 6")
    page.screenshot("ring_stepper")
    page.button("Back").click()
    page.wait_for("step 1 of 6")
    page.button("Play").click()
    page.wait_for("step 6 of 6, allgather")
    page.wait_for("144 bytes, 1.50 times its 96")
    assert page.button("Forward").is_disabled() and page.button("Play").is_enabled()

    keyboard = page.page.keyboard
    page.page.get_by_label("workers").focus()
    keyboard.press("ArrowUp")
    keyboard.press("Tab")  # leaves the field, which takes its value
    page.wait_for("a single worker that gathers and broadcasts sends 384")
    page.button("Forward").focus()
    keyboard.press("Enter")
    page.wait_for("step 1 of 8")
    keyboard.press("Tab")
    keyboard.press("Tab")  # past Play, to the slider
    keyboard.press("ArrowRight")
    page.wait_for("step 2 of 8")
    assert page.complaints == []
