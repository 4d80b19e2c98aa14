"""`launch` on real ranks: watched, waited for, stopped, killed, and resumed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time

import psutil
import pytest

from horovod_lm.jupyter.launch import TrainingJob, launch
from horovod_lm.jupyter.run_cell.job_result import RankError
from horovod_lm.jupyter.widgets.dashboard_view import RunView
from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.utils.errors import ConfigError
from tests.conftest import FULL
from tests.jupyter.conftest import children, is_left_over, wait_until

pytestmark = [pytest.mark.horovod, pytest.mark.usefixtures("nothing_left")]

CONFIG = "configs/tiny.yaml"
LONG = {
    "training": {"max_steps": 100_000, "num_epochs": 100_000, "eval_interval": 1000},
    "distributed": {"gloo_timeout_seconds": 8, "environment": {"MINE": "a secret"}},
}
SECONDS_TO_DETECT = 10


@pytest.fixture(autouse=True)
def in_project(tiny_project, monkeypatch):
    monkeypatch.chdir(tiny_project)


@pytest.fixture
def running():
    """Start a job that would take hours and wait until it trains; it is ended with the test."""
    jobs: list[TrainingJob] = []

    def start(run_name: str) -> TrainingJob:
        job = launch(CONFIG, overrides=LONG, run_name=run_name)
        jobs.append(job)
        wait_until(lambda: "step" in job.status or not job.is_running, 60, "the first step")
        assert job.is_running, job.status
        return job

    yield start
    for job in jobs:
        job.stop()


def test_a_job_is_there_at_once_and_ends_with_the_same_numbers_as_in_a_shell(train):
    started = time.monotonic()
    job = launch(CONFIG, np=2, run_name="whole")
    assert time.monotonic() - started < 2
    assert job.is_running and job.status == "starting" and job.metrics().empty
    assert asyncio.run(ticks_until(job)) > 10
    assert job.status.startswith("done after step 20 of 20, loss ")
    assert job.error is None and not job.is_running
    table = job.metrics()
    assert list(table[table.phase == "train"].step) == list(range(1, 21))
    assert table.loss.iloc[0] > table[table.phase == "train"].loss.iloc[-1]
    assert "step 20/20" in job.log() and job.log(1) == ""
    assert (job.run.log_dir / "console-rank0.log").read_text() == job.log(0)
    train("--config", CONFIG, "--run-name", "from_a_shell", ranks=2)
    tables = [open(f"runs/{name}/metrics.csv").read() for name in ("whole", "from_a_shell")]
    losses = [[line.split(",")[:6] for line in table.splitlines()] for table in tables]
    assert losses[0] == losses[1]


async def until(job: TrainingJob) -> TrainingJob:
    return await job


async def ticks_until(job: TrainingJob) -> int:
    """Wait for a job; return how often the event loop ran something else meanwhile."""
    waiting, ticks = asyncio.ensure_future(until(job)), 0
    while not waiting.done():
        await asyncio.sleep(0.05)
        ticks += 1
    assert waiting.result() is job
    return ticks


def test_a_stopped_job_has_saved_goes_on_and_is_kept_when_its_name_is_taken_anew(running):
    job = running("stopped_twice")
    assert psutil.Process(job.processes[1]).environ()["MINE"] == "a secret"
    with pytest.raises(ConfigError, match="run stopped_twice is not elastic"):
        job.add_worker()
    status = job.stop()
    assert status.startswith("stopped by you after step ")
    assert job.error is None and job.wait(1) is job
    saved = read_checkpoint(job.run.checkpoint_dir)
    again = eval(status.partition("; to resume: ")[2])
    with pytest.raises(ConfigError, match=r"run 'stopped_twice' is training already \("):
        launch(CONFIG, run_name="stopped_twice")  # the cell is run twice
    wait_until(lambda: "step" in again.status, 60, "the first step")
    again.stop()
    assert f"resuming at step {saved['global_step']} of" in again.log()
    table = (again.run.run_dir / "metrics.csv").read_text()
    launch(CONFIG, run_name="stopped_twice").stop()
    assert (again.run.run_dir.with_name("stopped_twice.1") / "metrics.csv").read_text() == table


@pytest.mark.parametrize(
    ("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)][: None if FULL else 1]
)
def test_a_dead_or_frozen_rank_is_named_in_time(running, rank, number, note_fault):
    job = running(f"dead{rank}{number}")
    wait_until(lambda: any(job.run.checkpoint_dir.glob("*.pt")), 30, "a checkpoint")
    os.kill(job.processes[rank], number)
    since = time.monotonic()
    with pytest.raises(RankError, match=f"rank {rank} was .*; rank {1 - rank} was ended") as caught:
        asyncio.run(until(job))
    seconds = time.monotonic() - since
    note_fault(seconds, caught.value)
    assert seconds < SECONDS_TO_DETECT
    assert job.status.startswith("failed after step ") and f"console-rank{rank}.log" in job.status
    assert children() == []
    assert read_checkpoint(job.run.checkpoint_dir)["global_step"] > 0


def test_what_a_failing_rank_said_is_in_the_error_and_the_job_is_complete(monkeypatch):
    # What is done last must be done when `wait` returns: `repr` had no seconds to show.
    update = RunView.update
    monkeypatch.setattr(RunView, "update", lambda self: (time.sleep(0.3), update(self))[1])
    elsewhere = {"data.source": "files", "data.path": "nowhere.txt", "data.data_dir": "empty"}
    job = launch(CONFIG, 2, run_name="wrong", overrides=elsewhere)
    with pytest.raises(RankError, match="rank 0 ended with exit code 2; rank 1 was") as caught:
        job.wait(60)
    assert "error: " in caught.value.trace and "nowhere.txt" in caught.value.trace
    assert re.match("<run wrong, 2 ranks: failed after [0-9]+ s: rank 0 ended", repr(job))
    assert job.status.endswith("console-rank0.log")


def test_an_interrupt_of_await_ends_the_job_and_says_so(kernel):
    kernel.run("from horovod_lm.jupyter.launch import launch")
    kernel.run(f"job = launch({CONFIG!r}, 2, overrides={LONG!r}, run_name='interrupted')")
    kernel.run("import time\nwhile 'step' not in job.status: time.sleep(0.1)")
    kernel.start("print('waiting', flush=True)\nawait job")
    kernel.read(lambda: "waiting" in kernel.text)
    time.sleep(1)
    kernel.manager.interrupt_kernel()
    kernel.read(lambda: False, 30)
    assert kernel.error["ename"] in ("CancelledError", "KeyboardInterrupt")
    assert "stopped by you after step" in kernel.text
    assert psutil.Process(kernel.pid).children(recursive=True) == []


def test_ranks_end_when_the_supervisor_itself_is_killed(running):
    job = running("unwatched")
    [supervisor] = filter(is_left_over, psutil.Process().children())
    supervisor.kill()
    with pytest.raises(RankError, match="its supervisor was killed"):
        job.wait(SECONDS_TO_DETECT)
    assert children() == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"np": 0}, "np=0: there must be at least one rank"),
        (
            {"overrides": {"distributed.hosts": [{"name": "host1", "slots": 2}]}},
            r"launch trains on this host; on those of distributed.hosts: .*launch\.hosts --config",
        ),
        ({"np": 10**11, "elastic": True}, "100000000000 ranks are too many: with "),
        ({"run_name": "nobody", "resume": True}, "run 'nobody' has no checkpoint to resume from"),
        (
            {"overrides": {"paths.run_dir": "/proc/{run_name}"}},
            "the run's folder /proc/.* cannot be written: No such file",
        ),
        ({"run_name": "a/b"}, "the run name 'a/b' must be the name of a folder"),
        ({"overrides": {"training.epochs": 3}}, "training.epochs"),
    ],
)
def test_what_cannot_be_launched_is_one_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        launch(CONFIG, **options)
    assert children() == []
