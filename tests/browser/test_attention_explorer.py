"""The attention explorer in a real browser: heads are chosen, cells hovered over, rows stepped."""

from __future__ import annotations

from tests.browser.test_playground import MODEL, fill

SHOW = """
from horovod_lm.jupyter.widgets.attention_explorer import AttentionExplorer
explorer = AttentionExplorer(model, tokenizer, "Once upon a time, Tom lost his red kite.")
explorer
"""
EXACT = "print('exactly', f'{explorer.attention.weights[1, 1, 4, 2]:.6g}'[:6])"


def says(page, text: str) -> None:
    page.page.locator(".lm-says").filter(has_text=text).wait_for(timeout=10_000)


def test_heads_cells_rows_and_another_sentence(open_notebook, storyteller):
    page = open_notebook(MODEL.replace("STORYTELLER", str(storyteller)) + SHOW, EXACT)
    page.run_all()
    heads, keyboard = page.page.locator(".lm-head"), page.page.keyboard
    heads.first.wait_for()
    assert heads.count() == 2 * 4
    heads.nth(5).click()
    page.page.wait_for_selector(".lm-head:nth-child(6)[aria-pressed=true]")
    page.wait_for("layer 2, head 2: mean entropy")
    page.wait_for("exactly")
    canvas = page.page.locator(".lm-canvas")
    size, box = page.page.locator(".lm-query").count(), canvas.bounding_box()
    canvas.hover(position={"x": 2.5 * box["width"] / size, "y": 4.5 * box["height"] / size})
    says(page, "(5) looks at")
    says(page, f"(3): {page.outputs()[1].split()[1]}")
    canvas.focus()
    keyboard.press("ArrowDown")
    keyboard.press("ArrowLeft")
    says(page, "(6) looks at")
    says(page, "(2): ")
    page.page.locator(".lm-query").nth(3).click()
    page.page.locator(".lm-links").focus()
    keyboard.press("ArrowDown")
    page.page.wait_for_selector(".lm-query.lm-chosen[data-place='4']")
    assert page.page.locator(".lm-links svg line").count() >= 5
    heads.nth(5).focus()
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    page.wait_for("layer 2, head 3: mean entropy")
    page.screenshot("attention_explorer")

    fill(page, "Sentence", "<i>Ann</i> \N{SLIGHTLY SMILING FACE} שלום")
    page.button("Show").click()
    page.page.locator(".lm-links").filter(has_text="<").wait_for()
    assert page.page.locator(".lm-links i").count() == 0
    fill(page, "Sentence", "word " * 500)
    page.button("Show").click()
    page.wait_for("DataError: the text has")
    assert not page.button("Show").is_disabled()
    assert page.complaints == []
