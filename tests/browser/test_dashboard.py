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
             overrides={"training.max_steps": STEPS, "training.num_epochs": 100000,
                        "training.eval_interval": 20, "training.per_gpu_batch_size": BATCH})
job.dashboard()
"""
PICTURE = ".jp-OutputArea-output img"
CHANGED = f"old => document.querySelector('{PICTURE}').src !== old"


def test_a_run_is_watched_and_stopped_by_its_button(lab, open_notebook, project):  # noqa: F811
    # For a picture: large steps, so that the curves are not far behind the step of the headline.
    steps, batch = ("300", "512") if asked_for_pictures() else ("20000", "8")
    page = open_notebook(LAUNCH.replace("STEPS", steps).replace("BATCH", batch))
    page.run_all()
    page.wait_for("left", 60)
    page.page.locator(PICTURE).wait_for(state="visible")
    page.page.wait_for_function(f"() => document.querySelector('{PICTURE}').naturalWidth > 900")
    page.wait_for("running")
    drawn = page.page.locator(PICTURE).get_attribute("src")
    page.page.wait_for_function(CHANGED, arg=drawn)
    if asked_for_pictures():
        page.wait_for("step 1", 300)
        page.page.wait_for_timeout(90_000)  # a curve, and not only its beginning
        page.page.wait_for_function(CHANGED, arg=page.page.locator(PICTURE).get_attribute("src"))
    page.screenshot("dashboard")
    page.button("Stop").click()
    page.wait_for("stopped by you after step")
    wait_until(lambda: ranks_of(lab) == 0, 10, "the end of the ranks")
    assert page.button("Ended").is_disabled()
    assert page.complaints == []
