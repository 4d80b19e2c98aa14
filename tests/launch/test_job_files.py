"""Job files for schedulers: the parts that can run here are run on simulated hosts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from horovod_lm.teaching.simulated_hosts import INTERFACE, SSH_PORT, Hosts, why_not_here
from horovod_lm.utils.config import load_config, save_config
from tests.conftest import ROOT

JOBS = ROOT / "configs" / "jobs"
WHY_NOT = why_not_here()
needs_hosts = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))


@pytest.fixture
def project(tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny project without runs, its model in configs/cluster.yaml."""
    folder = tmp_path / "a project"
    for name in ("configs", "data"):
        shutil.copytree(tiny_project / name, folder / name)
    config = load_config(folder / "configs" / "tiny.yaml", ["training.max_steps=5"])
    save_config(config, folder / "configs" / "cluster.yaml")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def log_in_as_clusters_do(hosts: Hosts) -> None:
    """Let ssh find port and key by itself, as it does where an administrator set it up."""
    with open(hosts.folder / "ssh_config", "a") as settings:
        settings.write(f"Port {SSH_PORT}\nIdentityFile {hosts.folder}/key\n")


@needs_hosts
def test_the_slurm_script_trains_on_the_hosts_that_slurm_names(project, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames host[0-1]" ] && printf "host0\\nhost1\\n"\n'
    )
    scontrol.chmod(0o755)
    given = {
        "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1",
        "INTERFACE": INTERFACE, "PATH": f"{tmp_path}:{os.environ['PATH']}:/usr/sbin",
    }  # fmt: skip
    with Hosts(2) as hosts:
        log_in_as_clusters_do(hosts)
        done = hosts.run(
            ["bash", str(JOBS / "slurm.sbatch")],
            cwd=project, timeout=120, env={**os.environ, **given},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 ranks on the CPU, 1 thread each" in done.stdout
    assert (project / "runs" / "slurm-7" / "checkpoints" / "final_model.pt").is_file()


@needs_hosts
def test_the_launcher_of_kubernetes_trains_on_the_hosts_of_its_file(project):
    [container] = pods_of_kubernetes()[0]["containers"]
    assert container["command"] == ["bash", "-c"]
    [command] = container["args"]
    with Hosts(2) as hosts:
        log_in_as_clusters_do(hosts)
        (hosts.folder / "hostfile").write_text("host0 slots=1\nhost1 slots=1\n")
        here = command.replace("/etc/mpi/hostfile", str(hosts.folder / "hostfile"))
        done = hosts.run(["bash", "-c", here.replace("eth0", INTERFACE)], cwd=project, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "2 ranks on the CPU, 1 thread each" in done.stdout
    assert (project / "runs" / "horovod-lm" / "checkpoints" / "final_model.pt").is_file()


def pods_of_kubernetes() -> list[dict]:
    """Return the pods of the launcher and of the workers."""
    replicas = yaml.safe_load((JOBS / "kubernetes.yaml").read_text())["spec"]["mpiReplicaSpecs"]
    return [replicas[role]["template"]["spec"] for role in ("Launcher", "Worker")]


def test_workers_and_launcher_of_kubernetes_are_one_image_with_one_disk_for_checkpoints():
    pods = pods_of_kubernetes()
    images = {pod["containers"][0]["image"] for pod in pods}
    claims = {volume["persistentVolumeClaim"]["claimName"] for pod in pods
              for volume in pod["volumes"] if volume["name"] == "runs"}  # fmt: skip
    assert len(images) == len(claims) == 1
