"""Ranks started from JupyterLab: a cell, and a job with its dashboard; both are stopped there."""

from __future__ import annotations

import shutil

import pytest

from tests.browser.conftest import SCREENSHOTS, command_of
from tests.jupyter.conftest import needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]

CELL = """%%horovodrun -np 2
import horovod.torch as hvd, torch, time
hvd.init()
total = hvd.allreduce(torch.ones(1) * hvd.rank(), name="sum", op=hvd.Sum).item()
print("total", total, flush=True)
time.sleep(SECONDS)"""
# For a picture: large steps, so that the curves are not far behind the step of the headline.
STEPS, BATCH = (300, 512) if SCREENSHOTS else (20_000, 8)
LAUNCH = f"""
from horovod_lm.jupyter.launch import launch
job = launch("configs/tiny.yaml", np=2, run_name="watched",
             overrides={{"training.max_steps": {STEPS}, "training.num_epochs": 100000,
                         "training.eval_interval": 20, "training.per_gpu_batch_size": {BATCH}}})
job.dashboard()
"""


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


def test_a_run_is_watched_and_stopped_by_its_button(lab, open_notebook, project):
    page = open_notebook(LAUNCH)
    page.run_all()
    page.wait_for("left", 60)
    page.wait_for("running")
    page.picture(unlike=page.picture())
    if SCREENSHOTS:
        page.wait_for("step 150 of", 300)  # a curve, and not only its beginning
        page.picture(unlike=page.picture())
    page.screenshot("dashboard")
    page.button("Stop").click()
    page.wait_for("stopped by you after step")
    wait_until(lambda: ranks_of(lab) == 0, 10, "the end of the ranks")
    assert page.button("Ended").is_disabled()
    assert page.complaints == []
