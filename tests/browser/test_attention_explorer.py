"""The attention explorer in a real browser: heads are chosen, cells hovered over, rows stepped."""

from __future__ import annotations

import pytest

from tests.browser.test_playground import fill

SHOW = """
from horovod_lm.jupyter.widgets.attention_explorer import AttentionExplorer
from horovod_lm.generation.load import load_model_for_generation
model, tokenizer, config = load_model_for_generation("STORYTELLER", device="cpu")
explorer = AttentionExplorer(model, tokenizer, "Once upon a time, Tom lost his red kite.")
explorer
"""
SAYS = ".lm-says"


@pytest.fixture
def page(open_notebook, storyteller):
    def open_explorer(*cells: str):
        page = open_notebook(SHOW.replace("STORYTELLER", str(storyteller)), *cells)
        page.run_all()
        page.page.locator(".lm-head").first.wait_for()
        return page

    return open_explorer


def says(page, text: str) -> None:
    page.page.wait_for_function(
        "text => document.querySelector('.lm-says').innerText.includes(text)", arg=text,
        timeout=10_000,
    )  # fmt: skip


def test_a_head_is_chosen_hovered_over_and_stepped_through(page):
    page = page("print('exactly', f'{explorer.attention.weights[1, 1, 4, 2]:.6g}'[:6])")
    assert page.page.locator(".lm-head").count() == 2 * 4
    page.page.locator(".lm-head").nth(5).click()
    page.page.wait_for_selector(".lm-head:nth-child(6)[aria-pressed=true]")
    page.wait_for("layer 2, head 2: mean entropy")
    page.page.wait_for_timeout(300)
    canvas = page.page.locator(".lm-canvas")
    size = page.page.locator(".lm-query").count()
    box = canvas.bounding_box()
    canvas.hover(position={"x": 2.5 * box["width"] / size, "y": 4.5 * box["height"] / size})
    says(page, "(5) looks at")
    says(page, "(3): ")
    exact = page.outputs()[1].split()[1]
    says(page, f"(3): {exact}")
    canvas.focus()
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("ArrowLeft")
    says(page, "(6) looks at")
    says(page, "(2): ")
    page.page.locator(".lm-query").nth(3).click()
    page.page.locator(".lm-links").focus()
    page.page.keyboard.press("ArrowDown")
    page.page.wait_for_selector(".lm-query.lm-chosen[data-place='4']")
    assert page.page.locator(".lm-links svg line").count() >= 5
    page.page.locator(".lm-head").nth(5).focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    page.wait_for("layer 2, head 3: mean entropy")
    page.screenshot("attention_explorer")
    assert page.complaints == []


def test_another_sentence_is_read_and_a_long_one_refused(page):
    page = page()
    fill(page, "Sentence", "<i>Ann</i> \N{SLIGHTLY SMILING FACE} שלום")
    page.button("Show").click()
    page.page.wait_for_function(
        "() => [...document.querySelectorAll('.lm-query')].map(one => one.textContent).join('')"
        ".includes('<i>')"
    )  # fmt: skip
    assert page.page.locator(".lm-links i").count() == 0
    fill(page, "Sentence", "word " * 500)
    page.button("Show").click()
    page.wait_for("DataError: the text has")
    assert not page.button("Show").is_disabled()
    assert page.complaints == []
