"""Ranks started from JupyterLab: a cell, a job, and the Stop button."""

from __future__ import annotations

import shutil

import pytest

from tests.browser.conftest import command_of
from tests.jupyter.conftest import needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]

CELL = """%%horovodrun -np 2
import horovod.torch as hvd, torch, time
hvd.init()
total = hvd.allreduce(torch.ones(1) * hvd.rank(), name="sum", op=hvd.Sum).item()
print("total", total, flush=True)
time.sleep(SECONDS)"""
JOB = """from horovod_lm.jupyter.launch import launch
job = launch('configs/tiny.yaml', np=2, run_name='lab',
             overrides={'training.max_steps': 100000, 'training.num_epochs': 10000})"""


@pytest.fixture
def project(lab, tiny_project):
    """The lab's folder as a project with prepared data."""
    for folder in ("configs", "data"):
        shutil.copytree(tiny_project / folder, lab.folder / folder, dirs_exist_ok=True)


def ranks_of(lab) -> int:
    return sum("horovod" in command_of(child) for child in lab.children())


def test_a_cell_shows_its_ranks_lines_and_the_stop_button_ends_the_next(
    lab, open_notebook, project
):
    cells = [CELL.replace("SECONDS", seconds) for seconds in ("0", "600")]
    page = open_notebook("%load_ext horovod_lm.jupyter", *cells)
    page.run_all()
    page.wait_for("[1] total 1")
    assert "[0] total 1.0\n[1] total 1.0" in page.outputs()[1]
    wait_until(lambda: "[0] total 1" in page.outputs()[2], 60, "the second cell's ranks")
    assert page.complaints == []
    page.command("notebook:interrupt-kernel")
    page.wait_for("stopped by you: every rank of the cell was ended")
    wait_until(lambda: ranks_of(lab) == 0, 10, "the end of the ranks")


def test_a_job_is_watched_and_stopped_from_the_page(lab, open_notebook, project):
    page = open_notebook(JOB, "await job")
    page.run_all()
    wait_until(lambda: ranks_of(lab) >= 2, 30, "the ranks")
    log = lab.folder / "runs" / "lab" / "logs" / "rank0.jsonl"
    wait_until(lambda: log.exists() and "train" in log.read_text(), 30, "the first step")
    page.command("notebook:interrupt-kernel")
    page.wait_for("stopped by you after")
    wait_until(lambda: ranks_of(lab) == 0, 10, "the end of the ranks")
