"""Ranks, `horovodrun` or the kernel are lost: the job ends in time, and resumes bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import FULL, Command
from tests.training.test_resume import assert_same_run, process_id, steps_done

STEPS = 150
GLOO_TIMEOUT = 10 if FULL else 4  # seconds
STALL_WARNING, STALL_SHUTDOWN = 1, 10  # seconds
SETTINGS = (
    "training.num_epochs=20", f"training.max_steps={STEPS}", "training.eval_interval=50",
    f"distributed.gloo_timeout_seconds={GLOO_TIMEOUT}",
    f"distributed.stall_warning_seconds={STALL_WARNING}",
    f"distributed.stall_shutdown_seconds={STALL_SHUTDOWN}",
)  # fmt: skip
RUN = ("--config", "configs/tiny.yaml", *(w for one in SETTINGS for w in ("--set", one)))

# Rank 1 waits or raises in its 61st step.
FAILING = """
import sys, time
from horovod_lm.train import main
from horovod_lm.training.trainer import Trainer
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.distributed import get_rank
fault, step = sys.argv.pop(1), Trainer.train_step
def failing(self, batches):
    if get_rank() == 1 and self.state.global_step == 60:
        print("now", flush=True)
        if fault == "hangs":
            time.sleep(600)
        raise RuntimeError("the goose is loose")
    return step(self, batches)
Trainer.train_step = failing
run_cli(main)
"""
KERNEL = """
import sys, time
from horovod_lm.jupyter.launch import launch
job = launch("configs/tiny.yaml", 2, overrides=sys.argv[2:], run_name=sys.argv[1])
time.sleep(600)
"""
STOOD_STILL = r"stood still for \d+ s and was killed"
# fault -> the set limit in seconds, and the message
FAULTS = {
    "rank 1 killed": (0, "process 1 was the first to fail, with exit code 137"),
    "rank 1 frozen": (GLOO_TIMEOUT, rf"rank 1 \(process \d+\) {STOOD_STILL}"),
    "kernel killed": (0, ""),
    "rank 1 raises": (0, r"\[1\]<stderr>:RuntimeError: the goose is loose"),
    "rank 1 hangs": (STALL_SHUTDOWN, r"rank 1 .* did not end within 4 s of SIGTERM"),
    "horovodrun killed": (0, ""),
    "rank 0 killed": (0, "process 0 was the first to fail, with exit code 137"),
    "rank 0 frozen": (GLOO_TIMEOUT, rf"rank 0 \(process \d+\) {STOOD_STILL}"),
}
IN_SHORT = 3
RESUMED_IN_SHORT = "rank 1 killed"


@pytest.fixture(scope="module")
def uninterrupted(tiny_project, start_for_module) -> Path:
    arguments = ["-m", "horovod_lm.train", *RUN, "--run-name", "no-fault"]
    finished = start_for_module(arguments, ranks=2).wait(120)
    assert finished.code == 0, finished.output[-4000:]
    return tiny_project / "runs" / "no-fault"


@pytest.mark.horovod
@pytest.mark.parametrize("fault", list(FAULTS)[: None if FULL else IN_SHORT])
def test_a_fault_ends_the_job_in_time_and_the_run_resumes_bit_for_bit(
    tiny_project, start, train, uninterrupted, note_fault, fault
):
    limit, message = FAULTS[fault]
    victim, _, what = fault.rpartition(" ")
    name = fault.replace(" ", "-")
    folder = tiny_project / "runs" / name
    (tiny_project / "failing.py").write_text(FAILING)
    if victim == "kernel":
        command = start(["-c", KERNEL, name, *SETTINGS])
    elif what in ("raises", "hangs"):
        command = start(["failing.py", what, *RUN, "--run-name", name], ranks=2)
    else:
        command = start(["-m", "horovod_lm.train", *RUN, "--run-name", name], ranks=2)
    command.wait_until(lambda: steps_done(folder) > 60, timeout=90)
    command.descendants()
    if what in ("killed", "frozen"):
        rank = int(victim[-1]) if victim[-1].isdigit() else None
        pid = command.process.pid if rank is None else process_id(folder, rank)
        os.kill(pid, signal.SIGKILL if what == "killed" else signal.SIGSTOP)
    seconds = seconds_until_ended(command, limit + 15)
    left = command.left_behind(0)
    assert command.process.returncode != 0
    assert re.search(message, command.output()), command.output()[-4000:]
    assert not (folder / "checkpoints" / "final_model.pt").exists()

    said, resumed = re.search(message, command.output()).group(), ""
    if FULL or fault == RESUMED_IN_SHORT:
        finished = train("--resume", "auto", "--run-name", name, ranks=2)
        step = int(re.search(r"resuming at step (\d+)", finished.output).group(1))
        assert 50 <= step < STEPS
        assert_same_run(uninterrupted, folder)
        resumed = f"bit for bit from step {step}"
    note_fault(seconds, said, limit, left, resumed)


def seconds_until_ended(command: Command, timeout: float) -> float:
    """Wait until a command and all its descendants have ended."""
    started = time.monotonic()
    while command.process.poll() is None or command.descendants():
        if time.monotonic() - started > timeout:
            pytest.fail(f"still running after {timeout} s:\n{command.output()[-4000:]}")
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.horovod
@pytest.mark.skipif(not FULL, reason="make faults slows a rank down")
def test_a_slow_rank_is_waited_for(tiny_project, start, uninterrupted, note_fault):
    """Rank 1 stands still for half the Gloo timeout, again and again."""
    command = start(["-m", "horovod_lm.train", *RUN, "--run-name", "slow"], ranks=2)
    folder = tiny_project / "runs" / "slow"
    command.wait_until(lambda: steps_done(folder) > 60, timeout=90)
    rank = psutil.Process(process_id(folder, 1))
    for _ in range(3):
        rank.suspend()
        time.sleep(GLOO_TIMEOUT / 2)
        rank.resume()
        time.sleep(0.05)
    finished = command.wait(90)
    assert finished.code == 0, finished.output[-4000:]
    assert_same_run(uninterrupted, folder)
    seconds = GLOO_TIMEOUT / 2
    note_fault(None, f"3 times {seconds:g} s: not ended", GLOO_TIMEOUT, command.left_behind(0),
               "not ended, same bits")  # fmt: skip
