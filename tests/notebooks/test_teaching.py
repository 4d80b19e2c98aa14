"""The teacher's table says of each page what the page is."""

from __future__ import annotations

import re

import pytest

from horovod_lm.jupyter.exercises import solutions
from horovod_lm.teaching.notebooks import read_notebook
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
ROWS = {
    name: (int(minutes), int(exercises))
    for name, minutes, exercises in re.findall(
        r"^\| \[.*?\]\(\.\./notebooks/(.*?)\) \| (\d+) min \|[^|]*\| (\d+) \|", TEXT, re.MULTILINE
    )
}
PAGES = sorted((ROOT / "notebooks").glob("*.ipynb"))
WORDS_A_MINUTE = 200


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_takes_what_the_table_says(path):
    minutes, exercises = ROWS[path.name]
    page = read_notebook(path)
    words = sum(len(cell.source.split()) for cell in page.cells if cell.cell_type == "markdown")
    assert minutes == pytest.approx(words / WORDS_A_MINUTE, abs=1.5)
    assert exercises == len(solutions(page))


def test_the_table_has_no_other_pages():
    assert ROWS.keys() == {path.name for path in PAGES}
