"""The training dashboard in a real browser: it updates, and its Stop button ends the job."""

from __future__ import annotations

import pytest

from tests.browser.conftest import SCREENSHOTS
from tests.browser.test_ranks import project, ranks_of  # noqa: F401
from tests.jupyter.conftest import needs_horovod, wait_until

pytestmark = [pytest.mark.horovod, needs_horovod]

# For a picture: large steps, so that the curves are not far behind the step of the headline.
STEPS, BATCH = (300, 512) if SCREENSHOTS else (20_000, 8)
LAUNCH = f"""
from horovod_lm.jupyter.launch import launch
job = launch("configs/tiny.yaml", np=2, run_name="watched",
             overrides={{"training.max_steps": {STEPS}, "training.num_epochs": 100000,
                         "training.eval_interval": 20, "training.per_gpu_batch_size": {BATCH}}})
job.dashboard()
"""


def test_a_run_is_watched_and_stopped_by_its_button(lab, open_notebook, project):  # noqa: F811
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
