"""The folder of a run: its paths, its description, its lock, and the renaming of earlier runs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from horovod_lm.training.run_dir import (
    RunFolder,
    default_run_name,
    lock_run,
    newest_run,
    read_sessions,
)
from horovod_lm.utils.config import Config, config_from_dict, load_config
from horovod_lm.utils.errors import ConfigError


@pytest.fixture
def config(tmp_path) -> Config:
    (tmp_path / "configs").mkdir()
    return config_from_dict({"seed": 5}, tmp_path)


def described(config: Config, name: str) -> RunFolder:
    run = RunFolder.of(config, name)
    run.run_dir.mkdir(parents=True, exist_ok=True)
    run.describe(config, world_size=2, devices="2 ranks on the CPU")
    return run


def test_a_run_describes_command_host_and_versions(config, monkeypatch):
    secrets = ["distributed.environment.A=secret", "distributed.hosts=[{environment: {A: secret}}]"]
    monkeypatch.setattr(sys, "argv", ["train", "--config", "x.yaml", *secrets])
    config = config.with_overrides({"distributed.environment": {"A": "secret"}})
    run = described(config, "first")
    assert (run.run_dir / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert load_config(run.run_dir / "config.yaml").to_dict() == config.to_dict()
    [session] = read_sessions(run.run_dir)
    assert session.pop("started").startswith("20") and session.pop("platform")
    assert {"horovod", "horovod_lm", "numpy"} <= session["versions"].keys()
    assert session.pop("versions")["torch"] == metadata.version("torch")
    assert session == {
        "command": ["train", "--config", "x.yaml", "distributed.environment.A=...",
                    "distributed.hosts=[{environment..."],
        "host": platform.node(),
        "python": platform.python_version(),
        "git_commit": None,  # this project is no repository
        "world_size": 2,
        "threads_per_rank": torch.get_num_threads(),
        "devices": "2 ranks on the CPU",
    }  # fmt: skip


def test_the_commit_is_recorded(config, tmp_path):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    [session] = read_sessions(described(config, "first").run_dir)
    assert len(session["git_commit"]) == 40


def test_a_resumed_run_keeps_its_earlier_sessions(config):
    for _ in range(2):
        run = described(config, "first")
    assert len(read_sessions(run.run_dir)) == 2
    assert sorted(path.name for path in run.run_dir.iterdir()) == ["config.yaml", "run.json"]


def test_an_earlier_run_is_renamed_and_never_overwritten(config):
    run = RunFolder.of(config, "first")
    run.run_dir.mkdir(parents=True)
    assert run.archive_existing_run() is None  # a folder that is no run stays
    for number in range(3):
        moved = run.archive_existing_run()
        assert (moved is None) == (number == 0)
        described(config, "first")
        (run.run_dir / "mine.txt").write_text(str(number))
    folders = sorted(path.name for path in run.run_dir.parent.iterdir())
    assert folders == ["first", "first.1", "first.2"]
    texts = [(run.run_dir.with_name(name) / "mine.txt").read_text() for name in folders]
    assert texts == ["2", "0", "1"]


def test_checkpoints_elsewhere_go_with_their_run(config, tmp_path):
    elsewhere = {"paths.checkpoint_dir": "kept/${run_name}/x", "paths.log_dir": "logs"}
    config = config.with_overrides(elsewhere)
    run = described(config, "first")
    for folder in (run.checkpoint_dir, run.log_dir):
        folder.mkdir(parents=True)
        (folder / "checkpoint_epoch0_step1.pt").touch()
    assert run.archive_existing_run() == tmp_path / "runs" / "first.1"
    archived = RunFolder.of(config, "first.1")
    assert (archived.checkpoint_dir / "checkpoint_epoch0_step1.pt").exists()
    assert not run.checkpoint_dir.exists() and run.log_dir.exists()  # the logs of every run
    shared = RunFolder.of(config.with_overrides({"paths.checkpoint_dir": "logs"}), "second")
    with pytest.raises(ConfigError, match="has checkpoints of an earlier run: put ..run_name. in"):
        shared.archive_existing_run()


TRAIN_FOR_A_MINUTE = """
import sys, time
from horovod_lm.training.run_dir import RunFolder, lock_run
from horovod_lm.utils.config import Config
with lock_run(RunFolder.of(Config().with_overrides(sys.argv[2:]), sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_run_has_one_owner_until_its_process_ends(config):
    run = described(config, "first")
    folders = [f"paths.{one}={getattr(run, one)}" for one in ("run_dir", "checkpoint_dir")]
    command = [sys.executable, "-c", TRAIN_FOR_A_MINUTE, "first", *folders]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "locked\n"
    same_checkpoints = config.with_overrides({"paths.checkpoint_dir": str(run.checkpoint_dir)})
    who = rf"another run trains in .* \(process {owner.pid} on {platform.node()} since 20"
    for second in (run, RunFolder.of(same_checkpoints, "second")):
        with pytest.raises(ConfigError, match=who), lock_run(second):
            pytest.fail("two runs train in one folder")
    with pytest.raises(ConfigError, match=who):
        run.archive_existing_run()
    owner.kill()
    owner.communicate()
    with lock_run(run):
        pass
    assert run.archive_existing_run()


def test_the_newest_run_is_the_one_started_last(config):
    assert len({default_run_name() for _ in range(20)}) > 1  # also within one second
    assert newest_run(config) is None
    for name, when in (("b", 300), ("a", 500), ("c", 400)):
        run = described(config, name)
        os.utime(run.run_dir / "run.json", (when, when))
    (run.run_dir.parent / "not a run").mkdir()
    assert newest_run(config) == "a"
