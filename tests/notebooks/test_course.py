"""The course's pages: stored whole, written by the habits, and still running."""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path

import nbformat
import pytest

from horovod_lm.jupyter.notebook_checks import find_problems
from horovod_lm.jupyter.notebooks import execute

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.ipynb"), *ROOT.glob("notebooks/*.ipynb")])


def code_cells(page: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(page, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_cell_was_run_no_error_is_stored_and_no_path_leaks(page):
    assert find_problems(nbformat.read(page, as_version=4)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_cells_are_short_and_explained(page):
    notebook = nbformat.read(page, as_version=4)
    lines = [len(cell.source.strip().splitlines()) for cell in code_cells(page)]
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert statistics.median(lines) <= 8 and max(lines) <= 25
    assert sum(len(text.split()) for text in prose) >= 5 * sum(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_at_most_one_cell_in_eight_ignores_its_output(page):
    tags = [set(cell.metadata.get("tags", [])) for cell in code_cells(page)]
    ignored = [found for found in tags if found & {"nbval-ignore-output", "nbval-skip"}]
    assert len(ignored) <= len(tags) / 8


@pytest.mark.horovod
@pytest.mark.slow
def test_the_example_still_runs(tmp_path, monkeypatch):
    """A shorter training, every cell: what the page imports and asks for is still there."""
    pytest.importorskip("horovod", reason="Horovod is not installed")
    page = tmp_path / "horovod_transformer.example.ipynb"
    shutil.copy(ROOT / page.name, page)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setenv("HOROVOD_LM_FAST", "1")
    notebook = execute(page, tmp_path / "out.ipynb", timeout=240)
    printed = "\n".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "largest difference below 1e-10: True" in printed
    assert "all losses equal to the last bit: True" in printed
    assert re.search(r"loss +\d\.\d+ at first, \d\.\d+ at the end", printed)
