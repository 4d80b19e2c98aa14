"""Hosts with different code or data are reported before the first step."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.horovod

# The training command, where rank 1 has something of its own, as if it were on another host.
TRAIN = """
import os, runpy, sys
sys.argv = ["train", "--config", "configs/tiny.yaml", "--run-name", "differing"]
if os.environ["HOROVOD_RANK"] == "1":
    sys.argv += {arguments}
    sys.path[:0] = {path!r}.split()
runpy.run_module("horovod_lm.train", run_name="__main__")
"""


@pytest.fixture
def others_data(tiny_project, tmp_path):
    """Prepared data of the same size whose first tokens are others."""
    shutil.copytree(tiny_project / "data", tmp_path / "data")
    with open(tmp_path / "data" / "train.bin", "r+b") as tokens:
        tokens.write(b"\0\0\0\0")
    return tmp_path / "data"


@pytest.fixture
def others_code(tmp_path):
    """The package with one line more."""
    shutil.copytree(ROOT / "horovod_lm", tmp_path / "horovod_lm")
    with open(tmp_path / "horovod_lm" / "load.py", "a") as file:
        file.write("# changed here only\n")
    return tmp_path


@pytest.mark.parametrize(
    ("what", "fix"), [("data", "delete .*: training prepares"), ("code", "copy the project from")]
)
def test_differing_ranks_are_named_before_anything_is_trained(
    what, fix, tiny_project, start, others_data, others_code
):
    arguments = ["--set", f"data.data_dir={others_data}"] if what == "data" else []
    program = TRAIN.format(arguments=arguments, path=str(others_code) if what == "code" else "")
    ended = start(["-c", program], ranks=2).wait(120)
    assert ended.code != 0
    sentence = rf"{what} of rank 1 on \S+ is \w+, but rank 0 on \S+ has \w+: .*{fix}"
    assert re.search(sentence, ended.output), ended.output
    assert not (tiny_project / "runs" / "differing").exists()
