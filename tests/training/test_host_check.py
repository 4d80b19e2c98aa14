"""Hosts with different code or data are reported before the first step."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.horovod

# The training command, where rank 1 has another hash, as if it were on another host.
TRAIN = """
import os
from horovod_lm.train import main
from horovod_lm.training import host_check
from horovod_lm.utils.cli import run_cli
if os.environ["HOROVOD_RANK"] == "1":
    host_check.hash_of_{what} = lambda folder: "another"
run_cli(main, ["--config", "configs/tiny.yaml", "--run-name", "differing"])
"""


@pytest.mark.parametrize(
    ("what", "fix"), [("data", "delete .*: training prepares"), ("code", "copy the project from")]
)
def test_differing_ranks_are_named_before_anything_is_trained(tiny_project, start, what, fix):
    ended = start(["-c", TRAIN.format(what=what)], ranks=2).wait(120)
    assert ended.code != 0
    sentence = rf"{what} of rank 1 on \S+ is another, but rank 0 on \S+ has \w+: .*{fix}"
    assert re.search(sentence, ended.output), ended.output
    assert not (tiny_project / "runs" / "differing").exists()
