"""Jobs of a real Slurm on two simulated hosts: train, cancel, limit, requeue, resume, lost rank."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from horovod_lm.jupyter.run_cell.slurm_job import events_of
from horovod_lm.launch.slurm import AGAIN, main, tasks_per_node
from horovod_lm.teaching.simulated_hosts import Hosts
from horovod_lm.teaching.simulated_slurm import Slurm, why_not_here
from horovod_lm.training.checkpoint import checkpoint_step, find_checkpoints
from horovod_lm.utils.config import load_config
from horovod_lm.utils.errors import ConfigError, DistributedError
from tests.conftest import ROOT
from tests.launch.runs import assert_same_run, copy_of, steps_of, wait_until

WHY_NOT = why_not_here()
needs_slurm = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
TINY = "configs/tiny.yaml"
JOB = str(ROOT / "configs" / "jobs" / "slurm.sbatch")
STEPS = ("--set", "training.max_steps=400", "--set", "training.num_epochs=200")
SLOW_DISK = """
import time, torch
save = torch.save
torch.save = lambda *values: (time.sleep(8), save(*values))
"""
RANK = """
import os
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.gloo_run import create_slot_env_vars
plan = get_host_assignments(parse_hosts("host0:2,host1:1"), 3)
wanted = create_slot_env_vars(plan[int(os.environ["SLURM_PROCID"])])
assert wanted == {name: os.environ[name] for name in wanted}, (wanted, dict(os.environ))
print(*(os.environ[name] for name in ("HOROVOD_RANK", "HOROVOD_GLOO_IFACE", "OMP_NUM_THREADS")))
"""


class Cluster(Slurm):
    """The cluster, and a project whose environment is not active."""

    def __init__(self, hosts: Hosts, project: Path) -> None:
        super().__init__(hosts, cpus=16, gpus=2)
        self.project = project

    def sbatch(self, name: str, *arguments: str, options: tuple[str, ...] = (), **env: str) -> str:
        """Submit the project's job file, and return the job's number."""
        call = ["sbatch", "--parsable", f"--job-name={name}", *options, JOB, TINY, *arguments]
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        env = {"PATH": path, "VIRTUAL_ENV": "", "PYTHONPATH": str(ROOT), **env}
        return self.run(*call, cwd=self.project, **env)

    def field(self, job: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def log(self, job: str) -> str:
        [path] = self.project.glob(f"slurm-*-{job}.log")
        return path.read_text()

    def wait(self, job: str, state: str, seconds: float = 60) -> str:
        """Wait for a state, and return the job's log. After the end no process of it is left."""
        wait_until(lambda: self.field(job, "JobState") == state, seconds, lambda: self.log(job))
        assert not processes(job)
        return self.log(job)

    def wait_for_steps(self, name: str, more: int = 20) -> None:
        """Wait until a run has made some more steps."""
        run_dir = self.project / "runs" / name
        target = steps_of(run_dir) + more
        wait_until(lambda: steps_of(run_dir) >= target, 60, lambda: f"{name} makes no step")


def processes(job: str) -> list[psutil.Process]:
    """Return the ranks of a job, the last rank first."""
    found = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except psutil.Error:
            continue
        if variables.get("SLURM_JOB_ID") == job and "HOROVOD_RANK" in variables:
            found.setdefault(variables["HOROVOD_RANK"], process)  # not its children
    return [process for _, process in sorted(found.items(), reverse=True)]


@pytest.fixture(scope="module")
def cluster(tiny_project: Path, tmp_path_factory) -> Iterator[Cluster]:
    project = copy_of(tiny_project, tmp_path_factory.mktemp("slurm") / "a project")
    (project / ".venv").symlink_to(sys.prefix)
    with Hosts(2) as hosts, Cluster(hosts, project) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory) -> str:
    """A job of one minute, the shortest that Slurm knows, whose ranks need 8 s to save."""
    patch = tmp_path_factory.mktemp("slow disk")
    (patch / "sitecustomize.py").write_text(SLOW_DISK)
    return cluster.sbatch(
        "limited", *STEPS, "--set", "data.num_workers=1",
        options=("--time=1", "--signal=B:USR1@10"), PYTHONPATH=f"{patch}:{ROOT}",
    )  # fmt: skip


@needs_slurm
def test_a_run_of_cancelled_requeued_and_killed_jobs_equals_one_of_horovodrun(
    cluster, limited, start
):
    command = ["-m", "horovod_lm.train", "--config", TINY, "--run-name", "whole", *STEPS]
    whole = start(command, ranks=2)
    # Two GPUs of each host are counted; there is one rank.
    first = cluster.sbatch("chain", *STEPS, options=("--gpus-per-node=2",))
    cluster.wait_for_steps("chain")
    cluster.run("scancel", first)
    log = cluster.wait(first, "CANCELLED")
    assert "note: each host uses 1 of 2 GPUs: --ntasks-per-node=2 uses all\n" in log
    assert "2 ranks on the CPU, 1 thread each\n" in log
    assert log.endswith(f"stopped before the end: {AGAIN}\n")

    second = cluster.sbatch("chain", *STEPS)
    cluster.wait_for_steps("chain")
    cluster.run("scontrol", "requeue", second)
    cluster.wait(second, "PENDING")
    cluster.wait_for_steps("chain")
    processes(second)[0].kill()
    log = cluster.wait(second, "FAILED")
    assert log.count("resuming at step") == 2
    [lost] = [
        event for line in log.splitlines(True) for event in events_of(line) if "code" in event
    ][:1]
    assert lost == {"event": "rank_ended", "rank": 1, "code": 137}
    assert log.splitlines()[-1].startswith("error: a rank failed: the first 'srun: error' above")

    third = cluster.sbatch("chain", *STEPS)
    assert "400 steps" in cluster.wait(third, "COMPLETED")
    assert whole.wait(60).code == 0
    assert_same_run(whole.log.parent / "runs" / "whole", cluster.project / "runs" / "chain")


@needs_slurm
def test_each_task_becomes_the_rank_that_horovodrun_would_make_of_it(cluster):
    # Interactively, with hosts of different numbers of ranks.
    salloc = ["salloc", "--quiet", "--nodes=2", "--ntasks=3", "--cpus-per-task=2"]
    launcher = [*salloc, sys.executable, "-m", "horovod_lm.launch.slurm"]
    printed = cluster.run(*launcher, sys.executable, "-c", RANK, PYTHONPATH=str(ROOT))
    assert sorted(printed.splitlines()) == ["0: 0 hv0 2", "1: 1 hv0 2", "2: 2 hv0 2"]
    env = {**cluster.env, "PYTHONPATH": str(ROOT)}
    failed = cluster.hosts.run([*launcher, "nothing"], env=env).stdout
    assert ": error: nothing cannot be started: No such file or directory\n" in failed
    assert failed.splitlines()[-1].startswith("error: a rank failed: the first 'srun: error' above")


@needs_slurm
def test_at_its_time_limit_a_job_has_more_than_the_time_of_horovodrun_to_save(cluster, limited):
    log = cluster.wait(limited, "FAILED", seconds=90)  # neither TIMEOUT nor COMPLETED
    assert cluster.field(limited, "ExitCode") == "130:0"
    assert "the time limit is near: every rank saves a checkpoint and ends\n" in log
    assert log.endswith(f"stopped before the end: {AGAIN}\n")
    run_dir = cluster.project / "runs" / "limited"
    assert checkpoint_step(find_checkpoints(run_dir / "checkpoints")[0]) == steps_of(run_dir)


@needs_slurm
def test_a_notebook_submits_a_job_and_stops_it(cluster, monkeypatch):
    from horovod_lm.jupyter.launch import launch

    monkeypatch.setenv("PATH", f"{cluster.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = load_config(cluster.project / TINY, ["training.max_steps=100000"])
    with pytest.raises(ConfigError, match="node configuration is not available"):
        launch(config, 3, run_name="wide", scheduler="slurm --nodes=3")
    job = launch(config, 2, run_name="notebook", scheduler="slurm --nodes=2")
    cluster.wait_for_steps("notebook")
    assert job.stop().startswith("stopped by you after step ")
    assert "2 ranks on the CPU" in job.log()


def test_outside_a_job_the_launcher_says_how_to_begin_one(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(DistributedError, match="^this is not a Slurm job: submit one with sbatch"):
        main(["python", "-c", "pass"])
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
