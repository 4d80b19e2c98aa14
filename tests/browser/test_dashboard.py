"""The training dashboard in a real browser: it moves, its Stop is clicked, the job is gone."""

from __future__ import annotations

import pytest

from tests.browser.conftest import asked_for_pictures
from tests.browser.test_ranks import project, ranks_of  # noqa: F401
from tests.jupyter.conftest import needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]

LAUNCH = """
from horovod_lm.jupyter.launch import launch
job = launch("configs/tiny.yaml", np=2, run_name="watched",
             overrides={"training.max_steps": 20000, "training.num_epochs": 100000,
                        "training.eval_interval": 100})
job.dashboard()
"""
PICTURE = ".jp-OutputArea-output img"


def test_a_run_is_watched_and_stopped_by_its_button(lab, open_notebook, project):  # noqa: F811
    page = open_notebook(LAUNCH)
    page.run_all()
    page.wait_for("left", 60)
    page.page.locator(PICTURE).wait_for(state="visible")
    page.page.wait_for_function(f"() => document.querySelector('{PICTURE}').naturalWidth > 900")
    page.wait_for("running")
    drawn = page.page.locator(PICTURE).get_attribute("src")
    page.page.wait_for_function(
        f"old => document.querySelector('{PICTURE}').src !== old",
        arg=drawn,
    )
    if asked_for_pictures():
        page.page.wait_for_timeout(20_000)  # a curve, and not only its beginning
    page.screenshot("dashboard")
    page.button("Stop").click()
    page.wait_for("stopped by you after step")
    wait_until(lambda: ranks_of(lab) == 0, 10, "the end of the ranks")
    assert page.button("Ended").is_disabled()
    assert page.complaints == []


def test_an_error_in_a_callback_is_visible(lab, open_notebook, project):  # noqa: F811
    page = open_notebook(
        "from horovod_lm.jupyter.launch import launch\n"
        "job = launch('configs/tiny.yaml', np=1, run_name='faulty',"
        " overrides={'training.max_steps': 100000, 'training.num_epochs': 100000})\n"
        "def fail():\n    raise RuntimeError('out of order')\n"
        "dashboard = job.dashboard()\ndashboard._job.ask_to_stop, kept = fail, job.ask_to_stop\n"
        "dashboard",
        "kept()",
    )
    page.run_cell(0)
    page.wait_for("waiting for the first step")
    page.button("Stop").click()
    page.wait_for("RuntimeError: out of order")
    page.run_cell(1)
    wait_until(lambda: ranks_of(lab) == 0, 40, "the end of the ranks")
