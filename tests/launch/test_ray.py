"""Jobs of a real Ray on two simulated hosts: train, stop, resume, a killed rank, too few nodes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovod_lm.teaching.simulated_hosts import Hosts, InHost, why_not_here
from horovod_lm.training.checkpoint import checkpoint_step, find_checkpoints
from tests.conftest import ROOT
from tests.launch.runs import assert_same_run, copy_of, steps_of, wait_until

WHY_NOT = why_not_here()
if importlib.util.find_spec("ray") is None:
    WHY_NOT = "Ray is not installed: make ray"
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
STEPS = ["--set", "training.max_steps=250", "--set", "training.num_epochs=200"]
STOP = """
import sys
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient("http://127.0.0.1:8265")
sys.stdin.read()
client.stop_job("first")
"""
RAY = str(Path(sys.executable).with_name("ray"))


class Cluster:
    """A Ray cluster with a CPU and a counted GPU on each host, and a project on their disk."""

    def __init__(self, hosts: Hosts, folder: Path, project: Path) -> None:
        self.hosts, self.folder, self.project = hosts, folder, project
        self.job = str(project / "configs" / "jobs" / "ray_job.py")
        self.run_dir = project / "runs" / "chain"
        usage = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), **usage}
        head, other = hosts.addresses.values()
        size = ["--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000", "--block"]
        self.start("host0", "--head", f"--node-ip-address={head}", *size)
        self.start("host1", f"--address={head}:6379", f"--node-ip-address={other}", *size)

    def start(self, host: str, *options: str) -> None:
        self.popen(host, RAY, "start", *options, host=host)
        wait_until(lambda: "runtime started" in self.log(host), 120, lambda: self.log(host))

    def popen(self, name: str, *call: str, host: str = "host0", **options: Any) -> InHost:
        """Start a command on a host; `log(name)` returns its output."""
        with open(self.folder / f"{name}.log", "w") as log:
            options |= {"stdout": log, "stderr": subprocess.STDOUT, "env": self.env, "cwd": "/"}
            return self.hosts.popen(call, host, **options)

    def train(self, name: str, *launcher: str) -> InHost:
        """Start a job of the run "chain", with one rank on each host."""
        python = [sys.executable, self.job, "--gpus", "1", "--run-name", "chain"]
        return self.popen(name, *launcher, *python, "--config", "configs/tiny.yaml", *STEPS)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for_steps(self, name: str) -> None:
        target = steps_of(self.run_dir) + 5
        wait_until(lambda: steps_of(self.run_dir) >= target, 120, lambda: self.log(name))

    def wait_for_end(self, name: str) -> None:
        wait_until(lambda: not processes(self.project), 60, lambda: self.log(name))


def processes(project: Path) -> list[psutil.Process]:
    """Return what runs in a project: the ranks, and the shell and the watchdog of each."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(project):
                found.append(process)
    return found


def is_rank_1(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        train = [sys.executable, "-m", "horovod_lm.train"]
        return process.cmdline()[:3] == train and process.environ().get("HOROVOD_RANK") == "1"
    return False


@pytest.fixture(scope="module")
def cluster(tiny_project: Path, tmp_path_factory) -> Iterator[Cluster]:
    project = copy_of(tiny_project, tmp_path_factory.mktemp("ray") / "a project")
    shutil.copytree(ROOT / "configs" / "jobs", project / "configs" / "jobs")
    # Each host has its own folder of sockets, whose paths must be short.
    with Hosts(2, own_folders=["/tmp/ray"]) as hosts:
        yield Cluster(hosts, project.parent, project)


def test_jobs_that_are_stopped_killed_and_submitted_again_equal_a_run_of_horovodrun(cluster, start):
    command = ["-m", "horovod_lm.train", "--config", "configs/tiny.yaml"]
    whole = start([*command, "--run-name", "whole", *STEPS], ranks=2)
    first = cluster.train("first", RAY, "job", "submit", "--submission-id=first", "--")
    # As `ray job stop first`, which takes seconds to start.
    stop = cluster.popen("stop", sys.executable, "-c", STOP, stdin=subprocess.PIPE)
    cluster.wait_for_steps("first")
    assert stop.stdin is not None
    stop.stdin.close()
    cluster.wait_for_end("first")
    assert first.wait(60) == stop.wait(60) == 0
    assert "2 ranks on the CPU, 1 thread each" in cluster.log("first")
    stopped_at = steps_of(cluster.run_dir)
    newest = find_checkpoints(cluster.run_dir / "checkpoints")[0]
    assert checkpoint_step(newest) == stopped_at

    second = cluster.train("second")
    cluster.wait_for_steps("second")
    [rank_1] = filter(is_rank_1, processes(cluster.project))
    rank_1.kill()
    assert second.wait(120) == 1
    assert f"resuming at step {stopped_at}" in cluster.log("second")
    assert cluster.log("second").splitlines()[-1] == (
        "error: rank 1 was killed by SIGKILL, exit code 137 (by somebody, or by the system when"
        " memory ran out); the same job resumes when it is submitted again"
    )
    cluster.wait_for_end("second")

    third = cluster.train("third")
    assert third.wait(120) == 0, cluster.log("third")
    assert "resuming at step" in cluster.log("third")
    assert whole.wait(120).code == 0
    assert_same_run(whole.log.parent / "runs" / "whole", cluster.run_dir)


def test_too_small_a_cluster_is_named(cluster):
    call = [sys.executable, cluster.job, "--ranks", "3", "--wait", "1"]
    done = cluster.hosts.run(call, env=cluster.env)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "error: there was no room for 3 ranks with 1 CPUs and 0 GPUs each within 1 s: the cluster"
        " has 2 CPUs and 2 GPUs, and 2 CPUs and 2 GPUs are free; ask for fewer --ranks, or"
        " --wait longer"
    )
