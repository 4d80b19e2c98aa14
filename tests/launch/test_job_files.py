"""Kubernetes' job file: valid for the operator, and what its containers run, on simulated hosts."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import yaml

from horovod_lm.teaching.simulated_hosts import INTERFACE, Hosts, why_not_here
from horovod_lm.utils.config import load_config, save_config
from tests.conftest import ROOT
from tests.launch.runs import copy_of

JOBS = ROOT / "configs" / "jobs"
WHY_NOT = why_not_here()
# As the operator mounts its key: a folder of mode 1777. /etc/ssh is as Debian's package makes it.
POD = """
set -e
mkdir -p ~/.ssh
mount -t tmpfs -o mode=1777 tmpfs ~/.ssh
install -m 600 "$0/key" ~/.ssh/id_rsa
install -m 644 "$0/key.pub" ~/.ssh/authorized_keys
install -m 600 "$0/host_key" /etc/ssh/ssh_host_ed25519_key
cp /usr/share/openssh/sshd_config /etc/ssh/
rm -r /run/sshd
"""


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((JOBS / "kubernetes.yaml").read_text())


def test_the_job_of_kubernetes_is_valid_for_the_operator(job):
    schema = yaml.safe_load(Path(__file__).with_name("mpijob.schema.yaml").read_text())
    jsonschema.validate(job, schema)
    job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["container"] = []
    with pytest.raises(jsonschema.ValidationError, match="'container' was unexpected"):
        jsonschema.validate(job, schema)


def test_launcher_and_workers_are_one_image_with_runs_and_data_on_the_volume(job):
    replicas = job["spec"]["mpiReplicaSpecs"]
    pods = [replicas[role]["template"]["spec"]["containers"][0] for role in ("Launcher", "Worker")]
    assert len({pod["image"] for pod in pods}) == len({pod["workingDir"] for pod in pods}) == 1
    worker = pods[1]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]
    kept = [PurePosixPath(mount["mountPath"]) for mount in worker["volumeMounts"]]
    config = load_config(ROOT / "configs" / "cluster.yaml")
    for folder in (config.paths.run_dir, config.data.data_dir):
        path = PurePosixPath(worker["workingDir"], folder)
        assert any(path.is_relative_to(mount) for mount in kept), path


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
def test_the_pods_of_kubernetes_train_and_a_job_that_is_replaced_resumes(
    job, tiny_project, tmp_path, monkeypatch
):
    project = copy_of(tiny_project, tmp_path / "a project")
    config = load_config(project / "configs" / "tiny.yaml", ["training.max_steps=5"])
    save_config(config, project / "configs" / "cluster.yaml")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dockerfile = (JOBS / "Dockerfile").read_text()
    runs = re.findall(r"^RUN ((?:.*\\\n)*.*)$", dockerfile, re.MULTILINE)
    [prepare_ssh] = [run for run in runs if "sshd_config" in run]
    [launcher] = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    with Hosts(3, own_folders=["/etc/ssh"]) as hosts:
        for host in hosts.names:
            for script in (POD, prepare_ssh, "exec /usr/sbin/sshd"):
                done = hosts.run(["sh", "-c", script, str(hosts.folder)], host)
                assert done.returncode == 0, done.stdout
        hostfile = hosts.folder / "hostfile"
        hostfile.write_text("host1 slots=1\nhost2 slots=1\n")
        [line] = launcher["args"]
        line = line.replace("/etc/mpi/hostfile", str(hostfile)).replace("eth0", INTERFACE)
        for said in ("2 ranks on the CPU, 1 thread each", "resum"):
            done = hosts.run([*launcher["command"], line], cwd=project, timeout=120)
            assert done.returncode == 0 and said in done.stdout, done.stdout
    assert (project / "runs" / "horovod-lm" / "checkpoints" / "final_model.pt").is_file()
