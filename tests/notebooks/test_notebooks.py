"""The stored notebooks are complete and follow the course's conventions."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from nbformat import NotebookNode

from horovod_lm.jupyter.exercises import solutions
from horovod_lm.teaching.notebooks import MAY_RAISE, headings, read_notebook, table_of_contents
from tests.conftest import ROOT

COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.ipynb")), *COURSE]
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}  # for times, process ids, a machine's name
# A folder that exists on the author's machine only.
PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|private|mnt|work\w*)/[\w.-]+")
WORDS_PER_MINUTE = 200


@pytest.fixture(scope="module", params=PAGES, ids=lambda path: path.name)
def page(request) -> NotebookNode:
    return read_notebook(request.param)


def code_of(page: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in page.cells if cell.cell_type == "code"]


def test_the_page_is_stored_executed_without_errors_or_private_paths(page):
    cells = [cell for cell in code_of(page) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in page.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            assert output.output_type != "error" or MAY_RAISE in cell.metadata.get("tags", [])
            data = output.get("data", {})
            shown = {kind: value for kind, value in data.items() if "image" not in kind}
            texts += [output.get("text", ""), json.dumps(shown), *output.get("traceback", [])]
        assert PRIVATE_PATH.findall("\n".join(texts)) == [], cell.id


def test_headings_nest_below_one_title_and_the_contents_are_up_to_date(page):
    levels = [level for _, level, _ in headings(page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False))
    assert page.cells[0].source.startswith("# ") and table_of_contents(page) in page.cells[0].source


def test_ids_are_names_that_stay_and_no_cell_is_empty(page):
    ids = [cell.id for cell in page.cells]
    assert len(set(ids)) == len(ids)
    # An id that an editor made up is made up anew when the cell is copied.
    assert [name for name in ids if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]{27})?", name)] == []
    assert [cell.id for cell in page.cells if not cell.source.strip()] == []


def test_cells_are_short_and_explained(page):
    cells = [cell.source.strip() for cell in code_of(page)]
    lines = [len(source.splitlines()) for source in cells]
    # A script that becomes a file is read in one piece.
    longest = [30 if source.startswith("%%writefile") else 25 for source in cells]
    words = sum(len(cell.source.split()) for cell in page.cells if cell.cell_type == "markdown")
    assert statistics.median(lines) <= 7
    assert all(length <= limit for length, limit in zip(lines, longest, strict=True))
    assert words >= 5 * sum(lines)
    for above, below in zip(page.cells, page.cells[1:], strict=False):
        # The check of an exercise stands right below its stub.
        stub = "exercise" in above.metadata.get("tags", [])
        assert stub or "markdown" in (above.cell_type, below.cell_type), f"{below.id}: unexplained"


def test_a_command_that_fails_stops_the_page(page):
    """`!command` is checked once the extension is loaded; a pipe has its last command's code."""
    cells = [cell.source for cell in code_of(page)]
    commands = [re.findall(r"^\s*(?:[\w, \[\]]+ = )?!(.+)$", text, re.M) for text in cells]
    extension = [bool(re.search(r"^%load_ext horovod_lm\.jupyter$", text, re.M)) for text in cells]
    with_commands = [number for number, lines in enumerate(commands) if lines]
    assert not with_commands or True in extension[: with_commands[0]]
    lines = [line for lines in commands for line in lines]
    assert [line for line in lines if re.search(r"\b(python|horovodrun)\b.*[^|]\|[^|]", line)] == []
    other = re.findall(r".*(?:subprocess\.|os\.system).*", "\n".join(cells))
    assert [line for line in other if "check=True" not in line] == []


def test_few_outputs_are_excused_from_being_compared(page):
    code = code_of(page)
    excused = [cell for cell in code if NOT_COMPARED & set(cell.metadata.get("tags", []))]
    assert 8 * len(excused) <= len(code)


def test_pictures_come_from_the_page_and_have_a_text(page):
    for cell in page.cells:
        assert not re.search(r"!\[[^]]*\]\(http|<img", cell.source)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output.data["text/plain"].startswith("figure: ")


def test_the_readme_maps_every_page():
    rows = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^\| \[[\w.]+\]\(([\w./]+\.ipynb)\) \|.*\d min \|$", rows, re.M))
    assert mapped == {path.relative_to(ROOT).as_posix() for path in PAGES}


def test_the_table_for_teachers_says_of_each_page_what_the_page_is():
    text = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    row = r"^\| \[.*?\]\(\.\./notebooks/(.*?)\) \| (\d+) min \|[^|]*\| (\d+) \|"
    rows = {name: tuple(map(int, numbers)) for name, *numbers in re.findall(row, text, re.M)}
    assert rows.keys() == {path.name for path in COURSE}
    for path in COURSE:
        page, (minutes, exercises) = read_notebook(path), rows[path.name]
        words = sum(len(cell.source.split()) for cell in page.cells if cell.cell_type == "markdown")
        assert minutes == pytest.approx(words / WORDS_PER_MINUTE, abs=1.5), path.name
        assert exercises == len(solutions(page)), path.name


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml", "ray_job.py"])
def test_each_line_of_a_job_file_that_page_09_explains_is_in_the_file(name):
    cell = f"{re.split('[._]', name)[0]}-lines"
    [table] = [one.source for one in read_notebook(COURSE[8]).cells if one.id == cell]
    explained = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(explained) >= 6
    text = (ROOT / "configs" / "jobs" / name).read_text()
    assert [words for words in explained if words not in text] == []
