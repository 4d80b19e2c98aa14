"""`make gpu` on a machine without a GPU: its sentence, its report, and parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.kit import Kit
from tests.gpu.parts import Found

KIT = str(Path(__file__).with_name("kit.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_exits_1():
    done = subprocess.run([sys.executable, KIT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: torch ") and done.stderr.count("\n") == 1


def test_a_rehearsal_writes_a_report_and_a_failing_part_stops_nothing(tmp_path, capsys):
    kit = Kit("cpu", tmp_path, source=None)
    kit.run({"no_such_part": 30, "logits": 0.1, "gradient_checkpointing": 60})
    kit.write()
    [report] = tmp_path.glob("gpu-CPU-*.json")
    wrong, late, right = json.loads(report.read_text())["parts"]
    assert "FAILED: " in wrong["result"] and "invalid choice: 'no_such_part'" in wrong["result"]
    assert late["result"] == "FAILED: not done in time"
    assert right["result"] == "holds"
    assert right["facts"]["torch.bfloat16, loss and gradients"] == {"value": 0.0, "at_most": 0.0}
    [table] = tmp_path.glob("gpu-CPU-*.md")
    assert table.read_text() in capsys.readouterr().out


def test_a_number_beyond_its_limit_and_nan_do_not_hold(tmp_path):
    found = Found(torch.device("cpu"), tmp_path)
    for name, value, limit in (("equal", 0.0, 0.0), ("near", 1e-6, 1e-5)):
        found.at_most(name, value, limit)
    assert not found.failed
    for name, value, limit in (("far", 1e-4, 1e-5), ("nan", float("nan"), 1.0)):
        found.at_most(name, value, limit)
    found.holds("equal tokens", False)
    assert found.failed == ["far", "nan", "equal tokens"]
