"""`python -m horovod_lm.data`, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from horovod_lm.data.__main__ import main
from horovod_lm.utils.config import save_config


@pytest.fixture
def file(make_config, tmp_path):
    return str(save_config(make_config(tokenizer="bpe"), tmp_path / "configs" / "small.yaml"))


def test_it_prepares_once_and_prints_a_summary(file, tmp_path, capsys):
    assert main(["--config", file]) == 0
    first = capsys.readouterr().out
    assert main(["--config", file]) == 0
    second = capsys.readouterr().out
    phases = "reading: 0%\ntraining the tokenizer: .*%\nencoding: .*%\nprepared in"
    assert re.match(phases, first)
    assert second.startswith("nothing has changed: the data exist\ncorpus")
    summary = first[first.index("corpus ") :]
    assert second.endswith(summary)
    for part in ("100 tiny stories", "bpe, 400 tokens", "bytes per token", "by document"):
        assert part in summary
    assert "entropy     41.20 nats per story" in summary
    assert str(tmp_path / "prepared") in summary


def test_a_closed_pipe_is_no_error(file, tmp_path):
    """As with `python -m horovod_lm.data … | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "horovod_lm.data", "--config", file]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    for _ in range(2):  # it prints first while it prepares, then at its end
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=env, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "prepared" / "metadata.json").is_file()
    os.close(writer)
