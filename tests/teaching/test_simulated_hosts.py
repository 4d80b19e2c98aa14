"""Simulated hosts: real sshd, real horovodrun, real links, every way to lose a host."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from horovod_lm.teaching import simulated_hosts as hosts_module
from horovod_lm.teaching.simulated_hosts import Hosts, why_not_here
from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.training.metrics import read_metrics
from horovod_lm.utils.cli import EXIT_INTERRUPTED
from horovod_lm.utils.config import Config, load_config, save_config
from horovod_lm.utils.errors import DistributedError
from tests.conftest import ROOT
from tests.elastic_runs import GLOO_TIMEOUT, ElasticRun, assert_nothing_was_lost, what_was_said

WHY_NOT = why_not_here()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
TIMEOUT = 5  # Gloo's timeout in seconds, in the tests of losses
OUT = 3  # seconds for which a link is cut
TO_DETECT = 10  # seconds after that timeout in which the job must have ended
PIPE = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
ENDLESS = [f"training.{name}=1000000" for name in ("max_steps", "num_epochs", "eval_interval")]
TRAINING = f"^{sys.executable} -m horovod_lm.train"  # the ranks, for pgrep and pkill
RANKS = """
import glob, os, horovod.torch as hvd, torch
hvd.init()
total = hvd.allreduce(torch.ones(3) * hvd.rank(), op=hvd.Sum)[0].item()
variables = [os.environ[name] for name in ("OF_ALL", "CUDA_VISIBLE_DEVICES", "MINE")]
print("AT", os.uname().nodename, hvd.rank(), hvd.local_rank(), hvd.cross_rank(), int(total),
      *variables)
print("SEEN", any(os.environb[b"OF_ALL"] in open(file, "rb").read()
                  for file in glob.glob("/proc/[0-9]*/cmdline") if os.path.exists(file)))
"""


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """After each test: no namespace's process, no cable, no folder; one thread on each rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    links = set(os.listdir("/sys/class/net"))
    yield
    assert set(os.listdir("/sys/class/net")) == links
    assert folders_of(os.getpid()) == []


def folders_of(owner: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"horovod-hosts-{owner}-*"))


def config_of(project: Path, **distributed: object) -> Config:
    settings = {"gloo_timeout_seconds": TIMEOUT, **distributed}
    return load_config(project / "configs" / "tiny.yaml", {"distributed": settings})


def train(*settings: str) -> list[str]:
    options = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "horovod_lm.train", "--config", "configs/tiny.yaml", *options]


def explained(hosts: Hosts, config: Config, command: list[str]) -> list[str]:
    """Return the command line that starts `command` on the hosts and says how it ended."""
    path = save_config(config, hosts.folder / "cluster.yaml")
    options = ["--config", str(path), "--hostfile", str(hosts.folder / "hostfile"), "--run"]
    return [sys.executable, "-m", "horovod_lm.launch.hosts", *options, "--", *command]


def weights(project: Path, run: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(project / "runs" / run / "checkpoints" / "final_model.pt")["model"]


def test_ranks_user_and_variables_are_where_the_configuration_says_and_unseen(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a folder"))
    Path(tempfile.gettempdir()).mkdir()
    second = {"name": "host1", "slots": 1, "environment": {"MINE": "it's $HOME"}}
    changes = {
        "ssh_user": "root",
        # Horovod does not pass the second one to other hosts.
        "environment": {"OF_ALL": "a b", "CUDA_VISIBLE_DEVICES": "2,3", "MINE": "no"},
        "hosts": [{"name": "host0", "slots": 2}, second],
    }
    with Hosts(2, own_folders=[tmp_path / "own"]) as hosts:
        for name in hosts.names:  # as in Debian, this host's own name comes first
            names = hosts.folder / f"{name}.hosts"
            names.write_text(f"127.0.1.1 {name}\n{names.read_text()}")
        config = hosts.configure(Config()).with_overrides({"distributed": changes})
        command = explained(hosts, config, [sys.executable, "-c", RANKS])
        command[command.index("--hostfile") + 1] = str(tmp_path / "own" / "a hostfile")
        done = hosts.run(command)
    assert done.returncode == 0, done.stdout
    assert sorted(re.findall("AT (.*)", done.stdout)) == [
        "host0 0 0 0 3 a b 2,3 no",
        "host0 1 1 0 3 a b 2,3 no",
        "host1 2 0 1 3 a b 2,3 it's $HOME",
    ]  # host, rank, local rank, cross rank, sum of the ranks, variables
    assert "SEEN False" in done.stdout and "SEEN True" not in done.stdout, done.stdout


def test_two_hosts_train_what_one_does_even_if_a_slow_link_is_cut_for_a_while(tiny_project, start):
    alone = start([*train()[1:], "--run-name", "one-host"], ranks=2).wait(120)
    assert alone.code == 0, alone.output
    config = config_of(tiny_project, gloo_timeout_seconds=30)
    with Hosts(2, own_folders=[tiny_project / "data"]) as hosts:
        done = hosts.horovodrun(config, [*train(), "--run-name", "two-hosts"], cwd=tiny_project)
        assert done.returncode == 0, done.stdout
        prepared = [
            hosts.run(["sha256sum", "data/metadata.json", "data/train.bin"], name, cwd=tiny_project)
            for name in hosts.names
        ]
        hosts.set_link(rate="2mbit")  # so that it still trains when the link is cut
        call = hosts.horovodrun_command(config, [*train(), "--run-name", "cut-off"])
        with hosts.popen(call, cwd=tiny_project, **PIPE) as job:
            said = until("step 5/", job)
            hosts.unplug("host1")
            time.sleep(OUT)
            assert job.poll() is None
            hosts.plug_in("host1")
            said += job.communicate(timeout=60)[0]
    assert job.returncode == 0, said
    # Each host's first rank wrote what its disk did not hold, and both wrote the same.
    assert [one.returncode for one in prepared] == [0, 0], [one.stdout for one in prepared]
    assert prepared[0].stdout == prepared[1].stdout
    one = weights(tiny_project, "one-host")
    for run in ("two-hosts", "cut-off"):
        other = weights(tiny_project, run)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), run
    steps = read_metrics(tiny_project / "runs" / "cut-off", "train")
    assert max(row["seconds_backward"] + row["seconds_allreduce"] for row in steps) > OUT / 2


# ---- hosts that are lost while they train ------------------------------------------------------


def ranks_left(hosts: Hosts) -> str:
    """Return Python's processes that do not end in time on the hosts that have power."""
    deadline = time.monotonic() + TO_DETECT
    while True:
        left = "".join(hosts.run(["pgrep", "-a", "python"], name).stdout for name in hosts.names)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


LOSSES: dict[str, tuple[Callable[[Hosts], object], str]] = {
    "link": (lambda hosts: hosts.unplug("host1"), "cannot reach host1 ("),
    "killed": (
        lambda hosts: hosts.run(["pkill", "-KILL", "-x", "python"], "host1"),
        "rank 1 on host1 failed first: it was killed by SIGKILL, exit code 137",
    ),
    "frozen": (
        lambda hosts: hosts.run(["pkill", "-STOP", "-f", TRAINING], "host1"),
        "rank 1 on host1 stopped responding, but the machine answers",
    ),
}


@pytest.mark.parametrize("how", LOSSES)
def test_a_lost_host_or_rank_ends_the_job_and_is_named(how, tiny_project, note_fault):
    lose, sentence = LOSSES[how]
    timeout = f"distributed.gloo_timeout_seconds={TIMEOUT}"
    run = f"lost-{how}"
    with Hosts(2) as hosts:
        config = hosts.configure(config_of(tiny_project))
        command = explained(hosts, config, [*train(*ENDLESS, timeout), "--run-name", run])
        job = hosts.popen(command, cwd=tiny_project, **PIPE)
        try:
            said = until("step 10/", job)
            lost = time.monotonic()
            lose(hosts)
            said += job.communicate(timeout=60)[0]
        finally:
            job.kill()
        seconds = time.monotonic() - lost
        note_fault(seconds, said)
        left = ranks_left(hosts)
    assert job.returncode == 2, said
    assert said.splitlines()[-1].startswith(f"error: {sentence}"), said[-3000:]
    assert seconds < TIMEOUT + TO_DETECT, f"{seconds:.1f} s"
    assert left == ""
    assert list((tiny_project / "runs" / run / "checkpoints").glob("checkpoint_*.pt"))


def test_a_stopped_job_saves_leaves_nothing_on_any_host_and_is_resumed_as_printed(tiny_project):
    with Hosts(2) as hosts:
        config = hosts.configure(config_of(tiny_project)).with_overrides(ENDLESS)
        cluster = save_config(config, tiny_project / "configs" / "endless cluster.yaml")
        training = [sys.executable, "-m", "horovod_lm.train", "--config", str(cluster)]
        command = explained(hosts, config, [*training, "--run-name", "stopped"])
        for words in ("step 10/", "step 50/"):
            job = hosts.popen(command, cwd=tiny_project, **PIPE)
            said = until(words, job)
            # As Slurm and Kubernetes do: to the command, not to its group.
            hosts.run(["pkill", "-TERM", "-f", "^[^=]*python -m horovod_lm.launch.hosts"])
            said += job.communicate(timeout=TO_DETECT + TIMEOUT)[0]
            assert ranks_left(hosts) == "" and job.returncode == EXIT_INTERRUPTED, said
            [resume] = re.findall("to resume.*?: (.*)", said)
            command = ["bash", "-c", f"exec {resume}"]
    assert "horovod_lm.launch.hosts --config" in resume and "resuming at step" in said


def test_elastic_training_goes_on_without_a_host_that_loses_power(tiny_project, note_fault):
    with Hosts(3) as hosts:
        run = ElasticRun(
            tiny_project, "elastic-hosts", 3,
            hosts=hosts.names, enter=hosts.enter(folder=tiny_project),
            config=hosts.configure(Config()),
        )  # fmt: skip
        try:
            run.wait_for_step(12)
            lost = time.time()
            hosts.power_off("host1")
            world = run.wait_for_world(1)
            finished = run.finish()
        finally:
            run.command.kill()
        left = ranks_left(hosts)
    assert finished.code == 0, finished.output[-6000:]
    assert (world["ranks_before"], world["ranks"]) == (3, 2)
    note_fault(world["time"] - lost, what_was_said(finished.output, world))
    assert world["time"] - lost <= GLOO_TIMEOUT + TO_DETECT
    assert "a rank was lost: 3 -> 2 ranks" in finished.output
    assert_nothing_was_lost(run, tiny_project)
    assert left == ""


def until(words: str, job: subprocess.Popen[str]) -> str:
    said = ""
    for line in job.stdout:
        said += line
        if words in line:
            return said
    pytest.fail(f"it never said {words!r}:\n{said[-3000:]}")


# ---- hosts that cannot be reached ----------------------------------------------------------------


def test_a_wrong_key_of_either_side_is_a_sentence_that_names_the_host(note_fault):
    with Hosts(2) as hosts:
        # A key of nobody who may log in.
        wrong_key = {"ssh_identity_file": str(hosts.folder / "host_key")}
        other_key = (hosts.folder / "key.pub").read_text()
        for changes, reason in ((wrong_key, "Permission denied"), ({}, "Host key verification")):
            config = hosts.configure(Config()).with_overrides({"distributed": changes})
            started = time.monotonic()
            done = hosts.run(explained(hosts, config, ["true"]))
            seconds = time.monotonic() - started
            note_fault(seconds, done.stdout)
            assert done.returncode == 2 and seconds < 20, done.stdout
            said = done.stdout.splitlines()[-1]
            assert said.startswith("error: cannot reach host1 (") and reason in said
            # horovodrun would log in, and send its environment, to whoever has this address now.
            (hosts.folder / "known_hosts").write_text(f"* {other_key}")


# ---- the hosts themselves ------------------------------------------------------------------------


def test_an_owner_that_is_killed_leaves_no_process():
    script = (
        "import json, sys, time; from horovod_lm.teaching.simulated_hosts import Hosts;"
        " hosts = Hosts(2);"
        " print(json.dumps([n.first_process for n in hosts._all.values()]), flush=True);"
        " time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    processes = json.loads(owner.stdout.readline())
    assert len(processes) == 3 and all(Path("/proc", str(pid)).exists() for pid in processes)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 10
    while any(Path("/proc", str(pid)).exists() for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [folder] = folders_of(owner.pid)
    shutil.rmtree(folder)


def test_a_missing_tool_right_host_unit_or_module_of_the_kernel_is_a_sentence(monkeypatch):
    monkeypatch.setattr(hosts_module, "TOOLS", ("sh", "no-such-tool"))
    with pytest.raises(DistributedError, match="need no-such-tool: apt-get install util-linux"):
        Hosts(2)
    monkeypatch.undo()
    with Hosts(1) as hosts:
        with pytest.raises(DistributedError, match="no host host7; there are host0"):
            hosts.run(["true"], "host7")
        for rate in ("10", "0mbit", "10mbps"):
            with pytest.raises(DistributedError, match="a link's rate is written as"):
                hosts.set_link(rate=rate)
        if not hosts_module.kernel_can_delay():
            with pytest.raises(DistributedError, match="kernel has no netem"):
                hosts.set_link(delay="50ms")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DistributedError, match="need root"):
        Hosts(2)
