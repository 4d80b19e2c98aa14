"""The playground in a real browser: tokens appear and are selected, Stop ends the text."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.jupyter.conftest import wait_until

MODEL = """
from horovod_lm.generation.load import load_model_for_generation
model, tokenizer, config = load_model_for_generation("STORYTELLER", device="cpu")
"""
ENDLESS = """
def endless(hidden, plain=model.logits):
    scores = plain(hidden)
    scores[..., tokenizer.eot_id] = -1e9
    return scores

model.logits = endless
"""
SHOW = """
from horovod_lm.jupyter.widgets.playground import Playground
play = Playground(model, tokenizer, config)
play
"""
INTERACTIVE = """
from horovod_lm.generate import interactive_generation
interactive_generation(model=model, tokenizer=tokenizer, config=config, device='cpu')
"""
CLEAR = "notebook:clear-all-cell-outputs"
CLOSE_TAB = """() => {
    const { commands } = window.jupyterapp;
    commands.execute('docmanager:save').then(() => commands.execute('application:close'));
}"""


@pytest.fixture
def page(open_notebook, storyteller):
    def open_playground(*cells: str):
        page = open_notebook(MODEL.replace("STORYTELLER", str(storyteller)), *cells)
        page.run_cell(0)
        page.run_cell(1)
        page.button("Generate").wait_for()
        return page

    return open_playground


def tokens(page):
    return page.page.locator(".lm-sample .lm-token")


def fill(page, label: str, text: str) -> None:
    """Type into an input, as a person does, and leave it."""
    box = page.page.get_by_label(label, exact=False).first
    box.fill(text)
    box.press("Tab")


def write_endlessly(page) -> None:
    fill(page, "Tokens", "90000")
    page.button("Generate").click()
    tokens(page).nth(5).wait_for()


def has_ended(page) -> bool:
    return page.ask_kernel("print(play.is_busy)") == "False"


def test_a_text_is_written_and_looked_into_and_ends_when_it_is_stopped_or_left(page):
    page = page(INTERACTIVE, ENDLESS + SHOW, "print('the kernel', 'is free')")
    page.wait_for("It needs a kernel")
    fill(page, "Tokens", "40")
    page.button("Generate").click()
    page.wait_for("done: ")
    count = tokens(page).count()
    assert 5 < count <= 40
    tokens(page).nth(3).click()
    page.wait_for("after the filters")
    page.page.wait_for_selector("[aria-selected=true][data-index='3']")
    for key, place in (("ArrowRight", 4), ("ArrowLeft", 3), ("End", count - 1), ("Home", 0)):
        page.page.keyboard.press(key)
        page.page.wait_for_selector(f"[aria-selected=true][data-index='{place}']")
    tokens(page).nth(6).click()
    page.page.wait_for_selector("[aria-selected=true][data-index='6']")
    page.screenshot("playground", 1)
    prompt = "<b>Once</b> \N{SLIGHTLY SMILING FACE} שלום"
    fill(page, "Prompt", prompt)
    page.button("Generate").focus()
    page.page.keyboard.press("Space")
    page.page.locator(".lm-prompt").get_by_text(prompt).wait_for()

    page.command(CLEAR)
    page.page.locator(".lm-tokens").wait_for(state="detached")
    page.run_cell(2)
    write_endlessly(page)
    assert page.button("Generate").is_disabled()
    page.run_cell(3)
    page.wait_for("the kernel is free")
    before = tokens(page).count()
    page.page.wait_for_function(
        "count => document.querySelectorAll('.lm-sample .lm-token').length > count", arg=before
    )
    page.button("Stop").click()
    page.wait_for("stopped: ")
    assert page.button("Stop").is_disabled() and not page.button("Generate").is_disabled()
    write_endlessly(page)
    assert not has_ended(page)
    page.command(CLEAR)
    wait_until(lambda: has_ended(page), 60, "the text's end")
    page.run_cell(2)
    write_endlessly(page)
    assert page.complaints == []
    page.page.evaluate(CLOSE_TAB)
    wait_until(lambda: has_ended(page), 60, "the text's end")


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_kernel_that_ends_while_it_writes_leaves_nothing_and_the_page_shows_it(page, how):
    page = page(ENDLESS + SHOW)
    write_endlessly(page)
    [old] = page.lab.kernels()
    if how == "restart":
        page.command("notebook:restart-kernel")
    else:
        old.kill()
        page.page.get_by_text("appears to have died").wait_for()
    page.page.locator(".jp-Dialog button.jp-mod-accept").click()
    page.page.locator(".jupyter-widgets-disconnected").first.wait_for()
    wait_until(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, 10, "the end")
    wait_until(lambda: len(page.lab.kernels()) == 1, 20, "a new kernel")
    [new] = page.lab.kernels()
    written = tokens(page).count()
    page.wait_until_idle()
    busy = sum(new.cpu_times()[:2])
    time.sleep(1)
    assert sum(new.cpu_times()[:2]) - busy < 0.3  # nothing runs in it
    assert tokens(page).count() == written
