"""A printed command works when pasted: programs that the shell finds, paths from here, quotes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.utils.cli import command, program, shown
from horovod_lm.utils.errors import UserError

COMMANDS = Path(sys.executable).parent


def test_another_environments_program_of_the_same_name_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(COMMANDS))
    assert command("m", "--config", "FILE") == "python -m m --config FILE"
    for name in ("python", "horovodrun"):
        (tmp_path / name).symlink_to(sys.executable)
    for path in (str(tmp_path), os.devnull):
        monkeypatch.setenv("PATH", path)
        assert program("python") == sys.executable
        assert program("horovodrun") == str(COMMANDS / "horovodrun")


def test_an_error_shows_control_characters_and_does_not_send_them():
    assert str(UserError("a\x1b[2Jb\nc\ud800")) == "a\\x1b[2Jb\nc\\ud800"


@pytest.mark.parametrize(
    ("path", "text"),
    [("/a/b/runs/x", "runs/x"), ("/a/c/x", "/a/c/x"), ("/a/b/-x", "./-x"), ("/other", "/other")],
)
def test_a_path_is_relative_where_that_is_shorter(path, text, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/a/b")
    assert shown(path) == text


def test_a_path_is_whole_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert shown(tmp_path / "x") == str(tmp_path / "x")
    monkeypatch.chdir("/")


ENDING = """
import atexit, gc
from horovod_lm.utils.cli import run_cli

atexit.register(lambda: print("frozen:", gc.get_freeze_count() > 1000))
run_cli(lambda _: print("\u2192") or 3)
"""


def test_a_command_prints_in_any_encoding_and_ends_without_a_garbage_collection():
    done = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("?\nfrozen: True\n", 3), done.stderr
