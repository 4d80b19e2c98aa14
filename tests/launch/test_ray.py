"""Jobs of a real Ray on two simulated hosts: train, stop, too few nodes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovod_lm.teaching.simulated_hosts import Hosts, InHost, why_not_here
from horovod_lm.training.metrics import read_metrics
from tests.conftest import ROOT

WHY_NOT = why_not_here()
if importlib.util.find_spec("ray") is None:
    WHY_NOT = 'Ray is not installed: python -m pip install -e ".[ray]"'
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
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

    def submit(self) -> InHost:
        """Submit a job with one rank on each host; `log("first")` returns its output."""
        python = [sys.executable, self.job, "--gpus", "1", "--config", "configs/tiny.yaml"]
        steps = ["--set", "training.max_steps=400", "--set", "training.num_epochs=200"]
        call = [RAY, "job", "submit", "--submission-id=first", "--", *python, *steps]
        return self.popen("first", *call)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def wait_until(condition: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def ranks(project: Path) -> list[psutil.Process]:
    """Return the ranks that train in a project, the last rank first."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project):
                found[process.environ().get("HOROVOD_RANK", "")] = process
        except psutil.Error:
            continue
    return [process for _, process in sorted(found.items(), reverse=True)]


@pytest.fixture(scope="module")
def cluster(tiny_project: Path, tmp_path_factory) -> Iterator[Cluster]:
    project = tmp_path_factory.mktemp("ray") / "a project"
    for name in ("configs", "data"):
        shutil.copytree(tiny_project / name, project / name)
    shutil.copytree(ROOT / "configs" / "jobs", project / "configs" / "jobs")
    # Each host has its own folder of sockets, whose paths must be short.
    with Hosts(2, own_folders=["/tmp/ray"]) as hosts:
        yield Cluster(hosts, project.parent, project)


def test_a_submitted_job_trains_on_both_hosts_and_leaves_no_rank_when_it_is_stopped(cluster):
    job = cluster.submit()
    # As `ray job stop first`, which takes seconds to start.
    stop = cluster.popen("stop", sys.executable, "-c", STOP, stdin=subprocess.PIPE)
    metrics = cluster.project / "runs" / "ray" / "metrics.csv"
    wait_until(
        lambda: metrics.is_file() and len(read_metrics(metrics.parent)) >= 20,
        60,
        lambda: cluster.log("first"),
    )
    assert len(ranks(cluster.project)) == 2
    assert stop.stdin is not None
    stop.stdin.close()
    wait_until(lambda: not ranks(cluster.project), 30, lambda: cluster.log("first"))
    assert job.wait(30) == stop.wait(30) == 0
    assert "2 ranks on the CPU, 1 thread each" in cluster.log("first")


def test_too_small_a_cluster_is_named(cluster):
    call = [sys.executable, cluster.job, "--ranks", "3", "--wait", "1"]
    done = cluster.hosts.run(call, env=cluster.env)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "error: there was no room for 3 ranks with 1 CPUs and 0 GPUs each within 1 s: the cluster"
        " has 2 CPUs and 2 GPUs, and 2 CPUs and 2 GPUs are free; ask for fewer --ranks, or"
        " --wait longer"
    )
