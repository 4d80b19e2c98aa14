"""Documented commands and the README's code run as written, in a project with a small model."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from textwrap import dedent, indent

import nbformat
import pytest

from horovod_lm.teaching.notebooks import execute
from horovod_lm.teaching.simulated_hosts import why_not_here
from tests.conftest import ROOT, Command, Finished
from tests.documented import not_yet_executed

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))
ACTIVATE = "source .venv/bin/activate"
THIS_MACHINE = "distributed: {hosts: [{name: localhost, slots: 2}]}\n"
# Added to a row: the body of a cell, and the end of a job.
BODY = "\nimport horovod.torch as hvd\nhvd.init()\nhvd.rank()"
AFTER = {"job.add_worker()": "await job"}

pytestmark = [pytest.mark.horovod, pytest.mark.slow]


@pytest.fixture(scope="module")
def project(tiny_project, tmp_path_factory) -> Path:
    """A project as a reader has it: small configurations, and the environment."""
    folder = tmp_path_factory.mktemp("a project")
    shutil.copytree(tiny_project / "configs", folder / "configs")
    shutil.copytree(tiny_project / "data", folder / "data")
    tiny = (folder / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    (folder / "configs" / "laptop.yaml").write_text(tiny, encoding="utf-8")
    of_cluster = re.sub("^distributed:.*\n", THIS_MACHINE, tiny, flags=re.MULTILINE)
    (folder / "configs" / "cluster.yaml").write_text(of_cluster, encoding="utf-8")
    (folder / "my_book.txt").write_text("It was a dark and stormy night.\n\n" * 400)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "01_attention.ipynb", folder / "notebooks")
    return folder


def code_in(section: str) -> list[str]:
    """Return the indented blocks of a section."""
    return list(map(dedent, re.findall(r"(?:^    .*\n)+", SECTIONS[section], re.MULTILINE)))


@pytest.fixture(scope="module")
def commands(project) -> Finished:
    """Run the README's commands, then those of other texts, in a shell without an environment."""
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("this environment is not one that make setup creates")
    assert f"    {ACTIVATE}\n" in SECTIONS["Two commands"]
    readme = code_in("At the command line")
    others = not_yet_executed("".join(indent(block, "    ") for block in readme))
    script = "\n".join([ACTIVATE, *readme, *others])
    env = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = Command(["bash", "-exc", script], project, {**env, "OMP_NUM_THREADS": "1"})
    try:
        return command.wait(360)
    finally:
        command.kill()


@pytest.mark.timeout(400)
def test_the_commands_run_as_written(project, commands):
    assert commands.code == 0, commands.output[-4000:]
    for name in ("first", "mine"):
        assert (project / "runs" / name / "checkpoints" / "final_model.pt").is_file()


@pytest.mark.timeout(800)
def test_the_notebook_rows_run_as_written(project, commands):
    cells = []
    for section in ("In a notebook", "Widgets"):
        rows = re.findall(r"^\| [^|!]+ \| (`.*`) \|$", SECTIONS[section], re.MULTILINE)
        assert len(rows) >= 5
        cells += code_in(section)
        cells += [code for row in rows for code in re.findall(r"`(.+?)`", row)]
    cells = [cell + BODY if cell.startswith("%%") else cell for cell in cells]
    cells = [part for cell in cells for part in (cell, AFTER.get(cell)) if part]
    if why_not_here():
        cells = [cell for cell in cells if "Hosts(" not in cell]
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(page, project / "rows.ipynb")
    execute(project / "rows.ipynb", project / "executed.ipynb", timeout=120)
