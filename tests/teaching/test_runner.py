"""The notebook runner: the same bytes twice, live output, clear errors, no process left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from horovod_lm.teaching import notebooks

TITLE = "# A page\n\n<!-- toc -->\nold\n<!-- tocstop -->\n\nText."
COMMAND = [sys.executable, "-m", "horovod_lm.teaching.notebooks"]
# A process that ignores SIGTERM, in a session of its own.
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
    "import shutil\nprint(sys.executable, os.getcwd(), shutil.which('jupyter'), sep='\\n')",
)


def write(path: Path, *sources: str, title: str = TITLE) -> Path:
    """Write a notebook: sources that begin with `#` are markdown cells, the others code cells."""
    cells = [new_markdown_cell(title, id="title")]
    for number, source in enumerate(sources):
        make = new_markdown_cell if source.startswith("#") else new_code_cell
        cells.append(make(source, id=f"cell-{number}"))
    nbformat.write(new_notebook(cells=cells), path)
    return path


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A page executed twice: what was printed, and the two stored notebooks.

    Without this environment on PATH, and beside another kernel of the same name.
    """
    folder = tmp_path_factory.mktemp("page")
    page = write(folder / "page.ipynb", *PAGE)
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["false"], "display_name": "x", "language": "y"}')
    env = {**os.environ, "PATH": "/usr/bin:/bin", "JUPYTER_PATH": str(folder)}
    printed = [run(page, "--out", folder / name, env=env) for name in ("a.ipynb", "b.ipynb")]
    assert [each.returncode for each in printed] == [0, 0], printed[0].stderr
    return printed[0], folder / "a.ipynb", folder / "b.ipynb"


def test_the_stored_notebook_has_ids_counts_outputs_and_nothing_that_differs_next_time(executed):
    _, first, second = executed
    assert first.read_bytes() == second.read_bytes()
    notebook = nbformat.read(first, as_version=4)
    assert [cell.id for cell in notebook.cells] == ["title"] + [f"cell-{n}" for n in range(6)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert code[0].outputs[0].text == "hello world\n"
    assert code[1].outputs[0].text == "one\ntwo\n"  # not the \r\n of the shell's terminal
    assert code[2].outputs[0].data["text/plain"].startswith("figure: Loss")
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert "- [First part](#First-part)\n- [Second part, 100%]" in notebook.cells[0].source
    assert "old" not in notebook.cells[0].source


def test_the_kernel_is_this_python_with_its_programs_in_the_notebooks_folder(executed):
    printed = nbformat.read(executed[1], as_version=4).cells[-1].outputs[0].text
    jupyter = Path(sys.executable).with_name("jupyter")
    assert printed.splitlines() == [sys.executable, str(executed[1].parent), str(jupyter)]


def test_sections_and_output_are_printed(executed):
    lines = executed[0].stdout.splitlines()
    first = next(n for n, line in enumerate(lines) if re.fullmatch(r"\[\d+ s\] First part", line))
    second = next(n for n, line in enumerate(lines) if line.endswith("] Second part, 100%"))
    assert lines[first + 1 : first + 4] == ["  hello world", "  one", "  two"]
    assert first < second
    assert "4 code cells" in lines[0] and lines[-1].startswith("executed in ")
    assert executed[0].stderr == ""


def test_only_the_picture_and_the_text_of_a_widget_are_stored():
    view = {notebooks.WIDGET_VIEW: {"model_id": "8f3c", "version_major": 2, "version_minor": 0}}
    still = {"text/plain": "figure: it", "image/png": "iVBORw0KGgo="}
    output = new_output("display_data", {**view, **still})
    page = new_notebook(cells=[new_code_cell("stepper", id="a", outputs=[output])])
    notebooks.normalize(page)
    assert page.cells[0].outputs[0].data == still


def test_an_error_names_the_cell_the_section_and_the_reason(tmp_path):
    page = write(
        tmp_path / "page.ipynb", "x = 1", "## Where it breaks", "y = x / 0  # here", "z = 1"
    )
    before = page.read_bytes()
    finished = run(page, "--out", tmp_path / "out.ipynb")
    assert finished.returncode == 2
    assert "cell 2 of 3, under 'Where it breaks'" in finished.stderr
    assert "    y = x / 0  # here" in finished.stderr
    assert "ZeroDivisionError: division by zero" in finished.stderr
    assert "Traceback" not in finished.stderr and "\x1b" not in finished.stderr
    assert page.read_bytes() == before
    up_to_there = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert up_to_there.cells[3].outputs[0].ename == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("!echo $$ > ../pid; exec sleep 600", "the cell took longer than 4 s"),
        ("import os\nopen('../pid', 'w').write(str(os.getpid()))\nos._exit(1)", "the kernel died"),
    ],
)
def test_a_cell_that_does_not_end_well_leaves_no_process_and_the_file_as_it_was(
    tmp_path, source, reason
):
    (tmp_path / "course").mkdir()
    page = write(tmp_path / "course" / "page.ipynb", "x = 1", source)
    before = page.read_bytes()
    with pytest.raises(notebooks.NotebookError, match=reason):
        notebooks.execute(page, page, timeout=4, quiet=True)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert page.read_bytes() == before and list(page.parent.iterdir()) == [page]


def test_an_interrupt_leaves_no_process_and_no_half_written_file(tmp_path):
    page = write(tmp_path / "page.ipynb", DEAF_CHILD, "!sleep 600 & echo running; sleep 600")
    before = page.read_bytes()
    job = subprocess.Popen(
        [*COMMAND, page, "--in-place"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert any("running" in line for line in job.stdout)  # while the cell still runs
    tree = psutil.Process(job.pid).children(recursive=True)
    assert len(tree) >= 4  # the kernel, a deaf child, a shell and its children
    job.send_signal(signal.SIGINT)
    assert job.wait(40) == 130
    _, alive = psutil.wait_procs(tree, timeout=5)
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
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": '
         '[{"cell_type": "markdown", "metadata": {}, "source": ""}]}', "without ids"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": '
         '[{"cell_type": "raw", "id": "a", "metadata": {}, "source": "\\ud800"}]}', "can't encode"),
        ("[7]", "not a notebook of format 4.5 or newer"),
        ("[" * 100_000, "not a notebook of format 4.5 or newer"),
        ("caf\udce9", "not a notebook: 'utf-8' codec can't decode byte 0xe9"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_notebook_is_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "page.ipynb"
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(notebooks.NotebookError, match=sentence):
        notebooks.read_notebook(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_notebook_in_another_encoding_of_unicode_is_read(tmp_path, encoding):
    page = write(tmp_path / "page.ipynb", "x = 'é'")
    page.write_bytes(page.read_text(encoding="utf-8").encode(encoding))
    assert notebooks.read_notebook(page).cells[1].source == "x = 'é'"


def test_an_unwritable_folder_is_found_before_the_first_cell(tmp_path):
    page = write(tmp_path / "page.ipynb", f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(notebooks.NotebookError, match=r"/proc/x.ipynb cannot be written: No such"):
        notebooks.execute(page, "/proc/x.ipynb", quiet=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("title", "text", "contents"),
    [
        ("# A page\n\n<!-- toc -->\n<!-- tocstop -->", "## Part\n```\n# comment\n```\n### Deeper",
         "- [Part](#Part)\n  - [Deeper](#Deeper)"),
        ("# A page\n\n## Contents\n<!-- toc -->\n<!-- tocstop -->", "## Part", "- [Part](#Part)"),
        ("# A page", "## Forget `set_epoch`", "- [Forget `set_epoch`](#Forget-set_epoch)"),
    ],
)  # fmt: skip
def test_the_contents_list_every_heading_but_their_own_and_those_in_code(title, text, contents):
    page = new_notebook(cells=[new_markdown_cell(title), new_markdown_cell(text)])
    assert notebooks.table_of_contents(page) == contents
