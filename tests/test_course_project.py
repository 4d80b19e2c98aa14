"""The program of docs/project.md accepts the runs of a project, and names what is wrong in them."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from tests.conftest import ROOT, Command

PAGE = (ROOT / "docs" / "project.md").read_text(encoding="utf-8")
PROGRAM = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]

pytestmark = [pytest.mark.horovod, pytest.mark.slow]


def test_the_program_reads_the_runs_of_a_project(tiny_project, train, tmp_path):
    def run(name: str, ranks: int, *arguments: str) -> None:
        train("--config", "configs/tiny.yaml", "--run-name", name, *arguments, ranks=ranks)
        shutil.copytree(tiny_project / "runs" / name, tmp_path / "runs" / name)

    def program() -> tuple[int, str]:
        finished = Command([sys.executable, "-c", PROGRAM], tmp_path, {}).wait(60)
        return finished.code, finished.output

    steps = "training.max_steps=4", "training.max_steps=8"
    run("alone", 1, "--set", steps[0])
    run("whole", 2, "--set", steps[1])
    run("killed", 2, "--set", steps[0])
    for name, stored in (("same-1", "alone"), ("same-2", "killed")):
        shutil.copytree(tmp_path / "runs" / stored, tmp_path / "runs" / name)
    code, output = program()
    assert code == 1 and "killed was not resumed" in output

    shutil.rmtree(tmp_path / "runs" / "killed")
    train("--resume", "runs/killed", "--set", steps[1], ranks=2)
    shutil.copytree(tiny_project / "runs" / "killed", tmp_path / "runs" / "killed")
    code, output = program()
    assert code == 0, output
    assert [line.split(" ")[0] for line in output.splitlines()] == [
        "one",
        "speed",
        "validation",
        "losses",
    ]
    assert output.endswith("equal: True\n")

    shutil.rmtree(tmp_path / "runs" / "whole")
    shutil.copytree(tmp_path / "runs" / "alone", tmp_path / "runs" / "whole")
    code, output = program()
    assert code == 1 and "whole must run on 2 ranks" in output
