"""`python -m horovod_lm.data`, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from horovod_lm.utils.config import save_config


@pytest.fixture
def run(make_config, tmp_path):
    """Run the command on a small configuration, from a folder that is not the project's."""
    file = save_config(make_config(tokenizer="bpe"), tmp_path / "configs" / "small.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "horovod_lm.data", "--config", str(file), *arguments]
        return subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=elsewhere, timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )  # fmt: skip

    return run


def test_it_prepares_once_and_prints_a_summary(run, tmp_path):
    first, second = run(), run()
    assert [first.returncode, second.returncode] == [0, 0], first.stderr
    phases = "reading: 0%\ntraining the tokenizer: .*%\nencoding: .*%\nprepared in"
    assert re.match(phases, first.stdout)
    assert second.stdout.startswith("nothing has changed: the data exist\ncorpus")
    summary = first.stdout[first.stdout.index("corpus ") :]
    assert second.stdout.endswith(summary)
    for part in ("100 tiny stories", "bpe, 400 tokens", "bytes per token", "by document"):
        assert part in summary
    assert "entropy     41.20 nats per story" in summary
    assert str(tmp_path / "prepared") in summary


def test_a_closed_pipe_is_no_error(run, tmp_path):
    """As with `python -m horovod_lm.data … | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    for _ in range(2):  # it prints first while it prepares, then at its end
        done = run(stdout=writer)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "prepared" / "metadata.json").is_file()
    os.close(writer)


def test_a_user_error_is_one_sentence_and_exit_code_2(run):
    done = run("--set", "data.source=files", "--set", "data.path=nowhere.txt")
    assert done.returncode == 2
    assert "error: data.path nowhere.txt: no such file" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
