"""Handouts have no solutions; answers are graded by the checks of the course's own page."""

from __future__ import annotations

import csv
import re

import pytest

from horovod_lm.jupyter.exercises import RIGHT, STUB_TAG, with_solutions
from horovod_lm.teaching import classroom
from horovod_lm.teaching.classroom import Grade, grade, handout, main, page_of
from horovod_lm.teaching.notebooks import NotebookError, read_notebook, store
from horovod_lm.utils.cli import EXIT_USER_ERROR
from horovod_lm.utils.errors import ConfigError
from tests.conftest import ROOT

COURSE = ROOT / "notebooks"
PAGES = sorted(COURSE.glob("*.ipynb"))
FIRST = COURSE / "01_attention.ipynb"


def stubs(notebook):
    return [cell for cell in notebook.cells if STUB_TAG in cell.metadata.get("tags", [])]


@pytest.fixture
def page(monkeypatch):
    """A page of the course, whose folder is the working directory, as for a teacher."""
    monkeypatch.chdir(ROOT)
    return read_notebook(FIRST)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_handout_lacks_the_solutions_and_nothing_else(path, tmp_path):
    assert main(["handout", str(path), "--out", str(tmp_path)]) == 0
    page, given = read_notebook(path), read_notebook(tmp_path / path.name)
    left = {cell.id: cell.source for cell in given.cells}
    removed = []
    for cell in page.cells:
        if left.get(cell.id) != cell.source:
            before, solution, after = re.split(
                "(<details>.*</details>)", cell.source, flags=re.DOTALL
            )
            removed.append(solution)
            assert (before + after).strip() == left.get(cell.id, "")
    assert len(removed) == len(stubs(page)) >= 2
    assert all("<summary>Solution</summary>" in solution for solution in removed)


def test_a_page_is_written_with_its_solutions_also_after_one_that_cannot_be_read(page, tmp_path):
    files = [str(tmp_path / "missing.ipynb"), str(FIRST)]
    assert main(["solutions", *files, "--out", str(tmp_path)]) == EXIT_USER_ERROR
    assert read_notebook(tmp_path / FIRST.name).cells == with_solutions(page).cells


def test_the_course_itself_is_not_overwritten(page, capsys):
    assert main(["handout", str(FIRST), "--out", str(COURSE)]) == EXIT_USER_ERROR
    assert "would be overwritten: choose another --out" in capsys.readouterr().err
    assert read_notebook(FIRST) == page


def test_an_interrupt_loses_no_grade_and_a_table_that_cannot_be_written_is_found_first(
    page, tmp_path, monkeypatch
):
    def interrupt(*_: object) -> None:
        assert "missing.ipynb" in table.read_text()  # already on the disk
        raise KeyboardInterrupt

    monkeypatch.setattr(classroom, "grade", interrupt)
    table, files = tmp_path / "grades.csv", [str(tmp_path / "missing.ipynb"), str(FIRST)]
    with pytest.raises(KeyboardInterrupt):
        main(["grade", *files, "--csv", str(table)])
    with pytest.raises(ConfigError, match=r"--csv /proc/x.csv cannot be written: No such file"):
        main(["grade", *files, "--csv", "/proc/x.csv"])


def test_right_and_wrong_answers_are_told_apart_whatever_else_was_changed(page, tmp_path, capsys):
    """A right answer, no answer, one that is not Python, and checks that were changed."""
    handed_in = handout(with_solutions(page))
    for cell in handed_in.cells:
        if "check(" in cell.source:
            cell.source = f'print("{RIGHT} everything")'
    mine = stubs(handed_in)
    mine[1].source = stubs(page)[1].source
    mine[2].source = "def unfinished(:"
    file = tmp_path / "anna, second try.ipynb"
    store(handed_in, file)
    empty, table = tmp_path / "empty.ipynb", tmp_path / "grades.csv"
    empty.write_bytes(b"\xff\xfe")  # it must not end the grading of the others
    assert main(["grade", str(empty), str(file), "--csv", str(table)]) == 0
    assert f"{file}: {len(mine) - 2} of {len(mine)} ({FIRST.name})" in capsys.readouterr().out
    with table.open(encoding="utf-8") as stream:
        not_graded, *rows = csv.DictReader(stream)
    assert not_graded["file"] == str(empty) and not_graded["said"]
    assert [row["exercise"] for row in rows] == [cell.id for cell in mine]
    assert [row["right"] for row in rows[:3]] == ["1", "0", "0"]
    assert rows[0]["said"].startswith(RIGHT)
    assert all(row["said"].startswith("not yet: ") for row in rows[1:3])


def test_an_answer_that_ends_the_kernel_is_reported(page):
    handed_in = handout(page)
    stubs(handed_in)[0].source = "import os\nos._exit(1)"
    assert grade(page, handed_in)[0] == Grade(
        stubs(page)[0].id, False, "not yet: the kernel died (out of memory, or killed)"
    )


def test_a_notebook_of_something_else_is_refused(page):
    page.cells = page.cells[:3]
    with pytest.raises(NotebookError, match="no page in .* has the exercises of this notebook"):
        page_of(page)
