"""Every stored page gives its outputs again, and every solution of an exercise is right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pytest

from horovod_lm.jupyter.exercises import RIGHT, STUB_TAG, exercises_alone, with_solutions
from horovod_lm.jupyter.notebooks import execute, read_notebook

ROOT = Path(__file__).resolve().parents[2]
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The example trains for minutes, and its own test runs all of it with a smaller model.
COMPARED = [ROOT / "horovod_transformer.API.ipynb", *COURSE]
NOT_YET = "not yet:"  # what a check says of anything else than a solution
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


def verdicts(cells: Iterable[nbformat.NotebookNode]) -> list[str]:
    """Return what the checks among some executed cells said."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    return [line for line in lines if line.startswith((RIGHT, NOT_YET))]


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.name)
def test_solutions_are_right_and_stubs_are_not(path, tmp_path):
    page = exercises_alone(read_notebook(path))
    stubs = [cell for cell in page.cells if STUB_TAG in cell.metadata.get("tags", [])]
    assert 2 <= len(stubs) <= 4
    # The page is stored with its stubs, and the test above has executed them.
    stored = verdicts(page.cells)
    assert len(stored) >= len(stubs) and all(line.startswith(NOT_YET) for line in stored), stored
    (tmp_path / "notebooks").mkdir()
    os.symlink(ROOT / "configs", tmp_path / "configs")
    solved = tmp_path / "notebooks" / "solved.ipynb"
    nbformat.write(with_solutions(page), solved)
    said = verdicts(execute(solved, solved).cells)
    assert len(said) >= len(stubs) and all(line.startswith(RIGHT) for line in said), said
