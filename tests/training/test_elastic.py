"""Ranks die, hang, leave and join, and nothing is lost but the steps since the last commit."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import FULL
from tests.elastic_runs import (
    COMMIT_INTERVAL,
    FAULTS,
    GLOO_TIMEOUT,
    STEPS,
    ElasticRun,
    assert_nothing_was_lost,
    what_was_said,
)
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.skipif(
    not Path(sys.executable).with_name("horovodrun").exists(),
    reason="Horovod is not installed: run python -m horovod_lm.setup.install_horovod",
)


@pytest.fixture
def elastic(tiny_project):
    """Start elastic runs, and end whatever is left of them."""
    runs: list[ElasticRun] = []

    def start(name: str, workers: int, **options) -> ElasticRun:
        runs.append(ElasticRun(tiny_project, name, workers, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.command.kill()


def assert_ended_well(run: ElasticRun) -> str:
    finished = run.finish()
    assert finished.code == 0, finished.output[-6000:]
    assert run.command.left_behind() == []
    assert f"{STEPS} steps in" in finished.output
    return finished.output


def assert_equal_to_a_static_resume(run: ElasticRun, at: int, ranks: int, train) -> None:
    """From the step of the last commit a run that was started anew ends with the same bits."""
    twin = run.folder.with_name(f"{run.folder.name}-static")
    shutil.copytree(run.folder, twin)
    [checkpoint] = (twin / "checkpoints").glob(f"*_step{at}.pt")
    train("--resume", str(checkpoint), ranks=ranks)
    assert_same_run(run.folder, twin)


LOST = [
    ("killed", 1, "sgd float16"),  # whose gradients are scaled
    ("stopped", 0, "adamw"),
    ("killed", 0, "adamw"),
    ("exception", 1, "sgd"),
]


@pytest.mark.parametrize(("fault", "victim", "optimizer"), LOST[: None if FULL else 2])
def test_a_run_goes_on_exactly_without_a_lost_rank(
    elastic, tiny_project, train, fault, victim, optimizer, note_fault
):
    optimizer, _, dtype = optimizer.partition(" ")
    settings = {"training.optimizer": optimizer, "training.amp_dtype": dtype or "auto"}
    run = elastic(f"{fault}-{victim}-{optimizer}{dtype}", 2, settings=settings)
    run.wait_for_step(12)
    at = run.signal(victim, FAULTS[fault])
    world = run.wait_for_world(1)
    assert (world["ranks_before"], world["ranks"]) == (2, 1)
    limit = GLOO_TIMEOUT if fault == "stopped" else 0
    noticed = world["time"] - world["seconds"] - at
    assert noticed <= limit + 10
    assert 0 <= world["steps_lost"] < COMMIT_INTERVAL and world["step"] % COMMIT_INTERVAL == 0

    output = assert_ended_well(run)
    note_fault(noticed, what_was_said(output, world))
    assert f"a rank was lost: 2 -> 1 ranks, resuming after step {world['step']}" in output
    assert_nothing_was_lost(run, tiny_project)
    taken = Counter((line["step"], line["world"]) for line in run.witnesses() if line["world"] == 0)
    survivors_steps = max(step for step, _ in taken)
    assert survivors_steps - world["step"] - world["steps_lost"] in (0, 1)  # the lost rank's last
    if fault == "killed":
        assert_equal_to_a_static_resume(run, world["step"], 1, train)


def test_two_ranks_become_one_and_two_again(elastic, tiny_project, train):
    # Staged gradients, as on one GPU: the static run that it is compared with does not stage.
    run = elastic("two-one-two", 2, staged=True)
    run.wait_for_step(7)
    run.signal(0, FAULTS["killed"])
    assert run.wait_for_world(1)["ranks"] == 1
    run.add_host()
    world = run.wait_for_world(2)
    assert (world["ranks_before"], world["ranks"], world["steps_lost"]) == (1, 2, 0)
    output = assert_ended_well(run)
    assert "ranks left or joined: 1 -> 2 ranks, resuming after step" in output
    assert_nothing_was_lost(run, tiny_project)
    assert_equal_to_a_static_resume(run, world["step"], 2, train)


def test_a_rank_joins_and_another_leaves(elastic, tiny_project):
    run = elastic("one-two-one", 1)
    run.wait_for_step(3)
    run.add_host()
    assert run.wait_for_world(1)["ranks"] == 2
    run.remove_host(1)
    world = run.wait_for_world(2)
    assert (world["ranks_before"], world["ranks"], world["steps_lost"]) == (2, 1, 0)
    output = assert_ended_well(run)
    assert re.search(r"127\.0\.0\.1 is no longer listed: its rank leaves", output)
    assert_nothing_was_lost(run, tiny_project)


@pytest.mark.skipif(not FULL, reason="make faults kills one of three ranks")
def test_three_ranks_become_two(elastic, tiny_project, train, note_fault):
    run = elastic("three-two", 3)
    run.wait_for_step(12)
    at = run.signal(1, FAULTS["killed"])
    world = run.wait_for_world(1)
    assert (world["ranks_before"], world["ranks"]) == (3, 2)
    output = assert_ended_well(run)
    note_fault(world["time"] - world["seconds"] - at, what_was_said(output, world))
    assert_nothing_was_lost(run, tiny_project)
    assert_equal_to_a_static_resume(run, world["step"], 2, train)


TOO_FEW = {"training.elastic_timeout_seconds": 5}


def test_too_few_ranks_end_with_a_checkpoint_and_one_sentence(elastic, train, note_fault):
    run = elastic("too-few", 2, settings=TOO_FEW, min_np=2, timeout_seconds=12)
    run.wait_for_step(12)
    at = run.signal(1, FAULTS["killed"])
    finished = run.command.wait(25)
    seconds = time.time() - at
    assert finished.code != 0
    assert run.command.left_behind() == []
    said = re.search(
        r"error: too few ranks are left, and none joined for 5 s; saved (.+); to resume:"
        r" start the same call again with --resume (.+)",
        finished.output,
    )
    assert said, finished.output[-4000:]
    note_fault(seconds, said.group())
    resumed = train("--resume", *shlex.split(said.group(2)), ranks=2)
    step = re.search(r"resuming at step (\d+)", resumed.output).group(1)
    assert f"_step{step}.pt" in said.group(1)


def test_a_rank_that_comes_after_the_others_gave_up_waiting_still_joins(elastic):
    # The first meeting fails on both sides.
    run = elastic("late", 1, settings={"distributed.gloo_timeout_seconds": 2}, late=5)
    run.wait_for_step(3)
    run.add_host()
    assert run.wait_for_world(1)["ranks"] == 2
    assert_ended_well(run)
