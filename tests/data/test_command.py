"""`python -m horovod_lm.data`, as a user runs it."""

from __future__ import annotations

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

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "horovod_lm.data", "--config", str(file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, timeout=120)

    return run


def test_it_prepares_once_and_prints_a_summary(run, tmp_path):
    first, second, third = run(), run(), run("--force")
    assert [one.returncode for one in (first, second, third)] == [0, 0, 0], first.stderr
    assert "prepared in" in third.stdout
    assert second.stdout.startswith("nothing has changed: the data exist\ncorpus")
    assert re.match(
        "reading: 0%\ntraining the tokenizer: .*%\nencoding: .*%\nprepared", first.stdout
    )
    for part in (
        "100 tiny stories",
        "bpe, 400 tokens",
        "bytes per token",
        "by document",
        "entropy     41.20 nats per story",
    ):
        assert part in second.stdout
    assert str(tmp_path / "prepared") in first.stdout
    assert (tmp_path / "prepared" / "metadata.json").is_file()


def test_it_shows_documents_without_preparing(run, tmp_path):
    shown = run("--show", "2")
    assert shown.returncode == 0
    assert shown.stdout.count("--- story") == 2 and "Soon" in shown.stdout
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--set", "data.source=files", "--set", "data.path=nowhere.txt"],
            "data.path nowhere.txt: no such file",
        ),
        (["--set", "data.source=poems"], "data.source must be"),
        (["--set", "model.vocab_size=100"], "at least 257 tokens"),
    ],
)
def test_a_user_error_is_one_sentence_and_exit_code_2(run, arguments, sentence):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and sentence in done.stderr
    assert "Traceback" not in done.stderr
