"""All widgets on one page of a real browser: what holds for each of them, and what each one does.

`test_playground.py` and `test_ranks.py` have what needs a kernel or a run of its own.
"""

from __future__ import annotations

import html

import nbconvert
import nbformat
import pytest

from tests.browser.conftest import Page, open_page
from tests.browser.test_playground import MODEL, fill

# In the order of the page; each ends with what shows the widget.
MODULES = "horovod_lm.jupyter.widgets"
WIDGETS = {
    "dashboard": f"from {MODULES}.dashboard import Dashboard\nDashboard('STORYTELLER')",
    "playground": f"from {MODULES}.playground import Playground\n"
    "Playground(model, tokenizer, config)",
    "attention explorer": f"from {MODULES}.attention_explorer import AttentionExplorer\n"
    "explorer = AttentionExplorer(model, tokenizer, 'Once upon a time, Tom lost his red kite.')\n"
    "explorer",
    "scaling lab": f"from {MODULES}.scaling_lab import ScalingLab\nScalingLab()",
    "ring stepper": f"from {MODULES}.ring_stepper import RingStepper\nRingStepper()",
}
PLACES = {name: place for place, name in enumerate(WIDGETS, start=1)}  # of its cell
# Of a cell: what is cut off, or wider than the place that it has and without a scroll bar.
CUT_OFF = """cell => {
    const labels = [...cell.querySelectorAll('.widget-label, .jupyter-button')]
        .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.innerText);
    const outputs = [...cell.querySelectorAll('.jp-OutputArea-output')]
        .filter(one => one.scrollWidth > one.clientWidth + 1)
        .map(one => `${one.scrollWidth} pixels in ${one.clientWidth}`);
    return [...labels, ...outputs];
}"""
# Of a cell: the texts whose contrast with what is behind them is below 4.5, WCAG's AA.
FAINT = """cell => {
    const parse = colour => {
        const [red, green, blue, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
        return [red, green, blue, alpha];
    };
    const over = (top, below) => top.slice(0, 3).map(
        (value, place) => value * top[3] + below[place] * (1 - top[3]));
    const behind = one => {
        const layers = [];
        for (; one; one = one.parentElement) {
            layers.push(parse(getComputedStyle(one).backgroundColor));
            if (layers.at(-1)[3] === 1) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const light = colour => {
        const [red, green, blue] = colour.map(value => value / 255).map(
            value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const found = [];
    for (const one of cell.querySelectorAll('.jp-OutputArea-output *')) {
        const own = [...one.childNodes].some(
            node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
        if (!own || !one.checkVisibility()) continue;
        if (one.closest('[disabled], svg, option, title')) continue;
        const below = behind(one), ink = parse(getComputedStyle(one).color);
        for (let up = one; up; up = up.parentElement) ink[3] *= getComputedStyle(up).opacity;
        const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) found.push(`${one.textContent.slice(0, 20)}: ${contrast.toFixed(2)}`);
    }
    return found;
}"""
CONTROLS = "button, input, select, textarea, summary, [role=slider], [contenteditable=true]"
# Of an output: the places of its controls that can be used, and the first one gets the focus.
FOCUS_FIRST = """(output, controls) => {
    const all = [...output.querySelectorAll(controls)];
    const usable = all.filter(one => !one.disabled && one.tabIndex >= 0 && one.checkVisibility());
    usable[0]?.focus();
    return usable.map(one => all.indexOf(one));
}"""
# Of what has the focus: its place among the controls of its output, and what it is called; the
# place is -1 of what only scrolls.
FOCUSED = """controls => {
    const one = document.activeElement, output = one.closest('.jp-OutputArea-output');
    if (!output) return null;
    const beside = one.closest('.widget-inline-hbox')?.querySelector('.widget-label');
    const name = one.getAttribute('aria-label') || one.labels?.[0]?.innerText
        || beside?.innerText || one.innerText;
    return [[...output.querySelectorAll(controls)].indexOf(one), name.trim()];
}"""


@pytest.fixture(scope="module")
def page(lab, chromium, storyteller):
    """All widgets on one page, each in a cell, with a text in the playground."""
    cells = [cell.replace("STORYTELLER", str(storyteller)) for cell in (MODEL, *WIDGETS.values())]
    page = open_page(lab, chromium, *cells)
    page.run_all()
    page.button("Forward").wait_for()
    page.button("Generate").click()
    page.wait_for("done: ")
    page.page.locator(".lm-sample .lm-token").first.click()
    page.wait_for("after the filters")
    yield page
    assert page.complaints == []
    page.close()


def cell(page: Page, name: str):
    return page.page.locator(".jp-CodeCell").nth(PLACES[name])


@pytest.mark.parametrize("name", WIDGETS)
@pytest.mark.parametrize("width", [1300, 800])
def test_nothing_is_cut_off(page, name, width):
    page.page.set_viewport_size({"width": width, "height": 1000})
    page.page.wait_for_timeout(300)
    assert cell(page, name).evaluate(CUT_OFF) == []


@pytest.mark.parametrize("name", WIDGETS)
@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_every_text_can_be_read(page, name, theme):
    page.choose_theme(theme)
    page.page.wait_for_timeout(500)  # the theme's colours fade in
    assert cell(page, name).evaluate(FAINT) == []


@pytest.mark.parametrize("name", WIDGETS)
def test_the_tab_key_reaches_every_control_and_each_has_a_name(page, name):
    output = page.output(PLACES[name])
    wanted = output.evaluate(FOCUS_FIRST, CONTROLS)
    seen: dict[int, str] = {}
    for _ in range(3 * len(wanted)):
        focused = page.page.evaluate(FOCUSED, CONTROLS)
        if focused is None:
            break
        seen.setdefault(*focused)
        page.page.keyboard.press("Tab")
    seen.pop(-1, None)
    assert set(wanted) <= set(seen)
    assert all(seen.values()), seen


def test_a_page_without_a_kernel_shows_a_picture_or_says_what_was_there(page):
    page.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    notebook = nbformat.read(page.lab.folder / page.name, as_version=4)
    shown = nbconvert.HTMLExporter().from_notebook_node(notebook)[0]
    for name, place in PLACES.items():
        [output] = notebook.cells[place].outputs
        if name in ("dashboard", "ring stepper"):
            assert len(output.data["image/png"]) > 10_000 and output.data["image/png"] in shown
        else:
            assert output.data["text/plain"].startswith(name)
            assert html.escape(output.data["text/plain"]) in shown


def test_the_ring_stepper_moves_by_mouse_and_keyboard(page):
    ring = page.output(PLACES["ring stepper"])
    page.wait_for("start: each worker holds its own numbers")
    assert page.button("Back").is_disabled()
    page.button("Forward").click()
    page.wait_for("step 1 of 6, reduce-scatter")
    page.wait_for("24 bytes, 0.25 times its 96")
    assert {"3+0", "chunk 3"} <= set(ring.locator("svg[role=img] text").all_text_contents())
    page.button("Forward").click()
    page.wait_for("step 2 of 6")
    page.screenshot("ring_stepper", PLACES["ring stepper"])
    page.button("Back").click()
    page.wait_for("step 1 of 6")
    page.button("Play").click()
    page.wait_for("step 6 of 6, allgather")
    page.wait_for("144 bytes, 1.50 times its 96")
    page.page.locator("button:disabled").filter(has_text="Forward").wait_for()
    page.page.locator("button:enabled").filter(has_text="Play").wait_for()

    keyboard = page.page.keyboard
    ring.get_by_label("workers").focus()
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


def test_a_slider_of_the_scaling_lab_moves_by_keyboard_and_everything_follows(page):
    place = PLACES["scaling lab"]

    def slider(name: str):
        """The handle of a slider, by what is written beside it."""
        label = page.page.get_by_text(name, exact=True)
        line = page.output(place).locator(".widget-inline-hbox").filter(has=label)
        return line.locator(".noUi-handle")

    drawn = page.picture(place)
    slider("workers").press("ArrowRight")
    page.wait_for("With 128 workers")
    drawn, said = page.picture(place, unlike=drawn), page.outputs()[place]
    slider("bandwidth of a node (Gbit/s)").press("ArrowRight")
    page.picture(place, unlike=drawn)
    assert page.outputs()[place] != said
    page.screenshot("scaling_lab", place)


def test_the_attention_explorer_shows_heads_cells_rows_and_another_sentence(page):
    def says(text: str) -> None:
        page.page.locator(".lm-says").filter(has_text=text).wait_for(timeout=10_000)

    heads, keyboard = page.page.locator(".lm-head"), page.page.keyboard
    assert heads.count() == 2 * 4
    heads.nth(5).click()
    page.page.wait_for_selector(".lm-head:nth-child(6)[aria-pressed=true]")
    page.wait_for("layer 2, head 2: mean entropy")
    exact = page.ask_kernel("print(f'{explorer.attention.weights[1, 1, 4, 2]:.6g}'[:6])")
    canvas = page.page.locator(".lm-canvas")
    size, box = page.page.locator(".lm-query").count(), canvas.bounding_box()
    canvas.hover(position={"x": 2.5 * box["width"] / size, "y": 4.5 * box["height"] / size})
    says("(5) looks at")
    says(f"(3): {exact}")
    canvas.focus()
    keyboard.press("ArrowDown")
    keyboard.press("ArrowLeft")
    says("(6) looks at")
    says("(2): ")
    page.page.locator(".lm-query").nth(3).click()
    page.page.locator(".lm-links").focus()
    keyboard.press("ArrowDown")
    page.page.wait_for_selector(".lm-query.lm-chosen[data-place='4']")
    assert page.page.locator(".lm-links svg line").count() >= 5
    heads.nth(5).focus()
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    page.wait_for("layer 2, head 3: mean entropy")
    page.screenshot("attention_explorer", PLACES["attention explorer"])

    fill(page, "Sentence", "<i>Ann</i> \N{SLIGHTLY SMILING FACE} שלום")
    page.button("Show").click()
    page.page.locator(".lm-links").filter(has_text="<").wait_for()
    assert page.page.locator(".lm-links i").count() == 0
    fill(page, "Sentence", "word " * 500)
    page.button("Show").click()
    page.wait_for("DataError: the text has")
    assert not page.button("Show").is_disabled()
