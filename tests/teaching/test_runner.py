"""Executing notebooks: the same bytes twice, progress while it runs, clear errors, nothing left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from horovod_lm.teaching import notebooks
from horovod_lm.teaching.notebook_checks import find_problems, table_of_contents

TITLE = "# A page\n\n<!-- toc -->\nold\n<!-- tocstop -->\n\nText."
COMMAND = [sys.executable, "-m", "horovod_lm.teaching.notebooks"]


def write(path: Path, *sources: str, title: str = TITLE) -> Path:
    """Write a notebook: sources that begin with `#` are text, the others code."""
    cells = [new_markdown_cell(title, id="title")]
    for number, source in enumerate(sources):
        make = new_markdown_cell if source.startswith("#") else new_code_cell
        cells.append(make(source, id=f"cell-{number}"))
    nbformat.write(new_notebook(cells=cells), path)
    return path


def run(*arguments: object, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **options
    )


# A process that does not hear SIGTERM and that no terminal's end reaches.
DEAF_CHILD = """\
import subprocess, sys
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)"""
PAGE = (
    "## First part",
    "import os, sys, time\nprint('hello', end='')\ntime.sleep(0.2)\nprint(' world')",
    "!printf 'one\\ntwo\\n'",
    "## Second part, 100%",
    "from horovod_lm.jupyter.plots import plot_loss\n"
    "plot_loss({'run': [{'phase': 'train', 'step': 1, 'loss': 2.0}]})",
    "print(sys.executable, os.getcwd())",
)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A page executed twice: what was printed, and the two stored notebooks."""
    folder = tmp_path_factory.mktemp("page")
    page = write(folder / "page.ipynb", *PAGE)
    printed = [run("execute", page, "--out", folder / name) for name in ("a.ipynb", "b.ipynb")]
    assert [each.returncode for each in printed] == [0, 0], printed[0].stderr
    return printed[0], folder / "a.ipynb", folder / "b.ipynb"


def test_executing_twice_gives_the_same_bytes(executed):
    _, first, second = executed
    assert first.read_bytes() == second.read_bytes()


def test_the_stored_notebook_keeps_ids_and_holds_counts_and_outputs(executed):
    notebook = nbformat.read(executed[1], as_version=4)
    assert [cell.id for cell in notebook.cells] == ["title"] + [f"cell-{n}" for n in range(6)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert code[0].outputs[0].text == "hello world\n"
    assert code[1].outputs[0].text == "one\ntwo\n"  # not the \r\n of the shell's terminal
    assert code[2].outputs[0].data["text/plain"].startswith("figure: Loss")
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any("execution" in cell.metadata for cell in notebook.cells)


def test_of_a_widget_only_its_picture_or_its_words_are_stored():
    view = {notebooks.WIDGET_VIEW: {"model_id": "8f3c", "version_major": 2, "version_minor": 0}}
    still = {"text/plain": "figure: it", "image/png": "iVBORw0KGgo="}
    outputs = [new_output("execute_result", {**view, **still}, execution_count=1)]
    outputs.append(new_output("display_data", {**view, "text/plain": "IntSlider()"}))
    page = new_notebook(cells=[new_code_cell("stepper", id="a", outputs=outputs)])
    notebooks.tidy(page)
    with_picture, alone = page.cells[0].outputs
    assert with_picture.data == still
    assert alone.data == {"text/plain": "IntSlider()"}


def test_the_kernel_is_this_python_in_the_notebooks_folder(executed):
    printed = nbformat.read(executed[1], as_version=4).cells[-1].outputs[0].text
    assert printed.split() == [sys.executable, str(executed[1].parent)]


def test_a_kernel_registered_elsewhere_under_the_same_name_is_not_taken(tmp_path):
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["false"], "display_name": "x", "language": "y"}')
    page = write(tmp_path / "page.ipynb", "print('here')")
    finished = run("execute", page, "--in-place", env={**os.environ, "JUPYTER_PATH": str(tmp_path)})
    assert finished.returncode == 0, finished.stderr


def test_the_commands_of_this_python_are_found(tmp_path):
    page = write(tmp_path / "page.ipynb", "import shutil; print(shutil.which('jupyter'))")
    finished = run("execute", page, "--in-place", env={**os.environ, "PATH": "/usr/bin:/bin"})
    assert str(Path(sys.executable).with_name("jupyter")) in finished.stdout


def test_it_shows_the_parts_and_what_the_cells_print(executed):
    lines = executed[0].stdout.splitlines()
    first = next(n for n, line in enumerate(lines) if re.fullmatch(r"\[\d+ s\] First part", line))
    second = next(n for n, line in enumerate(lines) if line.endswith("] Second part, 100%"))
    assert lines[first + 1 : first + 4] == ["  hello world", "  one", "  two"]
    assert first < second
    assert "4 cells of code" in lines[0] and lines[-1].startswith("executed in ")
    assert executed[0].stderr == ""


def test_lines_come_while_the_cell_still_runs(tmp_path):
    page = write(
        tmp_path / "page.ipynb", "import time\nprint('started', flush=True)\ntime.sleep(60)"
    )
    job = subprocess.Popen(
        [*COMMAND, "execute", page, "--in-place"], stdout=subprocess.PIPE, text=True
    )
    try:
        started = time.monotonic()
        assert any("started" in line for line in job.stdout)
        assert time.monotonic() - started < 50
    finally:
        job.send_signal(signal.SIGINT)
        job.wait(30)


def test_the_table_of_contents_is_renewed(executed):
    notebook = nbformat.read(executed[1], as_version=4)
    assert "- [First part](#First-part)\n- [Second part, 100%]" in notebook.cells[0].source
    assert "old" not in notebook.cells[0].source


def test_an_error_names_the_cell_its_part_and_the_reason(tmp_path):
    page = write(
        tmp_path / "page.ipynb", "x = 1", "## Where it breaks", "y = x / 0  # here", "z = 1"
    )
    before = page.read_bytes()
    finished = run("execute", page, "--out", tmp_path / "out.ipynb")
    assert finished.returncode == 2
    assert "cell 2 of 3, under 'Where it breaks'" in finished.stderr
    assert "    y = x / 0  # here" in finished.stderr
    assert "ZeroDivisionError: division by zero" in finished.stderr
    assert "Traceback" not in finished.stderr and "\x1b" not in finished.stderr
    assert page.read_bytes() == before
    up_to_there = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert up_to_there.cells[3].outputs[0].ename == "ZeroDivisionError"


def test_in_place_an_error_leaves_the_notebook_as_it_was(tmp_path):
    page = write(tmp_path / "page.ipynb", "x = 1", "x / 0")
    before = page.read_bytes()
    assert run("execute", page, "--in-place").returncode == 2
    assert page.read_bytes() == before and list(tmp_path.iterdir()) == [page]


def test_a_cell_that_takes_too_long_is_ended_with_its_processes(tmp_path):
    page = write(tmp_path / "page.ipynb", "!echo $$ > pid; exec sleep 600")
    finished = run("execute", page, "--in-place", "--timeout", 4)
    assert finished.returncode == 2 and "longer than 4 s" in finished.stderr
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_kernel_that_dies_is_said_to_have_died(tmp_path):
    page = write(tmp_path / "page.ipynb", "import os\nos._exit(1)")
    finished = run("execute", page, "--in-place")
    assert finished.returncode == 2 and "kernel died" in finished.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_half_written_file(tmp_path, number):
    page = write(tmp_path / "page.ipynb", DEAF_CHILD, "!sleep 600 & echo running; sleep 600")
    before = page.read_bytes()
    job = subprocess.Popen(
        [*COMMAND, "execute", page, "--in-place"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any("running" in line for line in job.stdout)
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(family) >= 4  # the kernel, a deaf child, a shell and its sleeping children
    job.send_signal(number)
    assert job.wait(40) == 130
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    assert alive == []
    assert "Traceback" not in job.stderr.read()
    assert page.read_bytes() == before and list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        ("{}", "not a notebook"),
        ("no json", "not a notebook"),
        ('{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": '
         '[{"cell_type": "markdown", "metadata": {}, "source": ""}]}', "without ids"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": '
         '[{"cell_type": "markdown", "metadata": {}, "source": ""}]}', "without ids"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": '
         '[{"cell_type": "poem", "id": "a", "metadata": {}, "source": ""}]}', "not a notebook"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_gets_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "page.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(notebooks.NotebookError, match=sentence):
        notebooks.read_notebook(path)


def test_check_finds_nothing_wrong_with_an_executed_page(tmp_path):
    page = write(tmp_path / "page.ipynb", "## Part", "print(1)")
    assert run("execute", page, "--in-place").returncode == 0
    finished = run("check", page)
    assert finished.returncode == 0, finished.stdout


def finished_page() -> nbformat.NotebookNode:
    cells = [new_markdown_cell(TITLE.replace("old", "- [Part](#Part)"), id="title"),
             new_markdown_cell("## Part", id="part"),
             new_code_cell("1", id="one", execution_count=1)]  # fmt: skip
    return new_notebook(cells=cells)


def test_check_finds_each_fault():
    assert find_problems(finished_page()) == []
    page = finished_page()
    page.cells[2].execution_count = None
    assert "executed as None" in find_problems(page)[0]
    page = finished_page()
    page.cells[2].outputs = [nbformat.v4.new_output("error", ename="E", evalue="v", traceback=[])]
    assert "holds an error: E: v" in find_problems(page)[0]
    page.cells[2].metadata["tags"] = ["raises-exception"]
    assert find_problems(page) == []
    page = finished_page()
    page.cells[2].outputs = [nbformat.v4.new_output("stream", text="in /" + "home/ann/file\n")]
    assert "folder of one machine: /" + "home/ann" in find_problems(page)[0]
    page = finished_page()
    page.cells[1].source = "### Part"
    assert "its headings skip a level" in find_problems(page)
    page = finished_page()
    page.cells[1].source = "## Another"
    assert "not up to date" in find_problems(page)[0]


def test_headings_in_code_blocks_are_not_headings():
    page = finished_page()
    page.cells[1].source = "## Part\n```\n# a comment\n```\n### Deeper"
    assert table_of_contents(page) == "- [Part](#Part)\n  - [Deeper](#Deeper)"


def test_the_contents_do_not_list_themselves():
    page = finished_page()
    page.cells[0].source = "# A page\n\n## Contents\n<!-- toc -->\n<!-- tocstop -->"
    assert table_of_contents(page) == "- [Part](#Part)"


def test_a_link_names_a_heading_as_it_is_shown():
    page = finished_page()
    page.cells[1].source = "## Forget `set_epoch`"
    assert table_of_contents(page) == "- [Forget `set_epoch`](#Forget-set_epoch)"
