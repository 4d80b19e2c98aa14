"""The training dashboard in a real browser: it moves, its Stop is clicked, the job is gone."""

from __future__ import annotations

import pytest

from tests.browser.test_ranks import project, ranks_of  # noqa: F401
from tests.jupyter.conftest import needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]

LAUNCH = """
from horovod_lm.jupyter.launch import launch
job = launch("configs/tiny.yaml", np=2, run_name="watched",
             overrides={"training.max_steps": 100000, "training.num_epochs": 100000})
job.dashboard()
"""


def test_a_run_is_watched_and_stopped_by_its_button(lab, open_notebook, project):  # noqa: F811
    page = open_notebook(LAUNCH)
    page.run_all()
    page.wait_for("left", 60)
    picture = page.page.locator(".jp-OutputArea-output img")
    picture.wait_for(state="visible")
    page.page.wait_for_function(
        "() => document.querySelector('.jp-OutputArea-output img').naturalWidth > 900"
    )
    page.wait_for("running", 10)
    page.screenshot("dashboard")
    page.button("Stop").click()
    page.wait_for("stopped by you after step", 30)
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
        "await __import__('asyncio').sleep(20)\nkept()",
    )
    page.run_all()
    page.wait_for("waiting for the first step", 30)
    page.button("Stop").click()
    page.wait_for("RuntimeError: out of order", 20)
    wait_until(lambda: ranks_of(lab) == 0, 40, "the end of the ranks")
