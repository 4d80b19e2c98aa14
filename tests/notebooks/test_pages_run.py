"""Every stored page gives its outputs again, and every solution of an exercise is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from horovod_lm.jupyter.exercises import RIGHT, STUB_TAG, exercises_alone, with_solutions
from horovod_lm.jupyter.notebooks import execute, read_notebook

ROOT = Path(__file__).resolve().parents[2]
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The example trains for minutes, and its own test runs all of it with a smaller model.
COMPARED = [ROOT / "horovod_transformer.API.ipynb", *COURSE]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONPATH": str(ROOT),
}

pytestmark = [pytest.mark.horovod, pytest.mark.slow]


@pytest.fixture(autouse=True)
def needs_horovod():
    if not Path(sys.executable).with_name("horovodrun").exists():
        pytest.skip("Horovod is not installed: run python -m horovod_lm.install_horovod")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.name)
def test_a_page_gives_its_stored_outputs_again(path):
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q",
         "--nbval-sanitize-with", Path(__file__).with_name("sanitize.cfg"),
         "--nbval-cell-timeout", "300", "-p", "no:cacheprovider", "--timeout=600", path.name],
        cwd=path.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


def said(page: nbformat.NotebookNode, folder: Path) -> list[str]:
    """Execute a page; return the lines of its checks."""
    (folder / "notebooks").mkdir()
    os.symlink(ROOT / "configs", folder / "configs")
    nbformat.write(page, folder / "notebooks" / "page.ipynb")
    done = execute(folder / "notebooks" / "page.ipynb", folder / "notebooks" / "done.ipynb")
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    return [line for line in lines if line.startswith((RIGHT, "not yet:"))]


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.name)
def test_solutions_are_right_and_stubs_are_not(path, tmp_path):
    page = exercises_alone(read_notebook(path))
    stubs = [cell for cell in page.cells if STUB_TAG in cell.metadata.get("tags", [])]
    assert 2 <= len(stubs) <= 4
    for name, notebook in (("not yet:", page), (RIGHT, with_solutions(page))):
        folder = tmp_path / name.strip(":").replace(" ", "_")
        folder.mkdir()
        lines = said(notebook, folder)
        assert len(lines) >= len(stubs) and all(line.startswith(name) for line in lines), lines
