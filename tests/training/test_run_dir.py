"""One run, one folder: where it is, what it tells, and that nothing of an earlier one is lost."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from horovod_lm.training.run_dir import (
    RunFolder,
    default_run_name,
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
    run.run_dir.mkdir(parents=True)
    run.describe(config, world_size=2, devices="2 ranks on the CPU")
    return run


def test_a_run_is_one_folder_under_the_project(config, tmp_path):
    run, base = RunFolder.of(config, "first"), tmp_path / "runs" / "first"
    assert (run.name, run.run_dir, run.checkpoint_dir) == ("first", base, base / "checkpoints")
    assert (run.log_dir, run.tensorboard_dir) == (base / "logs", base / "tensorboard")


def test_a_run_tells_what_was_run_where_and_with_which_versions(config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config", "x.yaml"])
    run = described(config, "first")
    assert load_config(run.run_dir / "config.yaml").to_dict() == config.to_dict()
    record = json.loads((run.run_dir / "run.json").read_text())
    [told] = record["sessions"]
    assert record["name"] == "first" and told["world_size"] == 2
    assert told["command"] == ["train", "--config", "x.yaml"]
    assert told["host"] == platform.node() and told["python"] == platform.python_version()
    assert told["threads_per_rank"] == torch.get_num_threads()
    assert told["versions"]["torch"] == metadata.version("torch")
    assert {"horovod", "horovod_lm", "numpy"} <= told["versions"].keys()
    assert told["devices"] == "2 ranks on the CPU"
    assert told["started"].startswith("20") and told["platform"]
    assert told["git_commit"] is None  # this project is no repository


def test_the_commit_is_told_where_there_is_one(config, tmp_path):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    run = described(config, "first")
    [session] = read_sessions(run.run_dir)
    told = session["git_commit"]
    assert len(told) == 40 and set(told) <= set("0123456789abcdef")


def test_a_run_that_goes_on_keeps_what_its_earlier_sessions_told(config, monkeypatch):
    calls = (["train", "--config", "x.yaml"], ["train", "--resume", "auto"])
    run = RunFolder.of(config, "first")
    run.run_dir.mkdir(parents=True)
    for number, call in enumerate(calls, start=1):
        monkeypatch.setattr(sys, "argv", call)
        run.describe(config, world_size=number, devices="")
    sessions = read_sessions(run.run_dir)
    assert [one["command"] for one in sessions] == list(calls)
    assert [one["world_size"] for one in sessions] == [1, 2]
    assert sorted(path.name for path in run.run_dir.iterdir()) == ["config.yaml", "run.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "a"}', "7"])
def test_a_file_that_tells_nothing_of_sessions_has_none(tmp_path, text):
    assert read_sessions(tmp_path) == []
    (tmp_path / "run.json").write_text(text)
    assert read_sessions(tmp_path) == []


def test_an_earlier_run_is_set_aside_and_never_overwritten(config):
    for number in range(3):
        run = RunFolder.of(config, "first")
        moved = run.archive_existing_run()
        assert (moved is None) == (number == 0)
        described(config, "first")
        (run.run_dir / "mine.txt").write_text(str(number))
    folders = sorted(path.name for path in run.run_dir.parent.iterdir())
    assert folders == ["first", "first.1", "first.2"]
    told = [(run.run_dir.with_name(name) / "mine.txt").read_text() for name in folders]
    assert told == ["2", "0", "1"]


def test_a_folder_that_is_no_run_is_left_where_it_is(config):
    run = RunFolder.of(config, "first")
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "notes.txt").write_text("mine")
    assert run.archive_existing_run() is None
    assert (run.run_dir / "notes.txt").read_text() == "mine"


def test_the_newest_run_is_the_one_started_last(config):
    assert newest_run(config) is None
    for name, when in (("b", 300), ("a", 500), ("c", 400)):
        run = described(config, name)
        os.utime(run.run_dir / "run.json", (when, when))
    (run.run_dir.parent / "not a run").mkdir()
    assert newest_run(config) == "a"


def test_names_that_nobody_chose_differ_by_the_second():
    assert default_run_name("tiny").startswith("tiny-20") and len(default_run_name("x")) == 17


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".", "..", "/tmp/x", "a\0b"])
def test_a_name_that_is_no_folders_name_is_a_sentence(config, name):
    with pytest.raises(ConfigError, match="run name"):
        RunFolder.of(config, name)


def test_a_folder_that_cannot_be_written_is_a_sentence(config, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    run = RunFolder.of(config, "first")
    with pytest.raises(ConfigError, match="first.* cannot be written") as error:
        run.describe(config, world_size=1, devices="")
    assert "\n" not in str(error.value) and isinstance(run.run_dir, Path)
