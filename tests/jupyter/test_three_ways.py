"""One notebook that starts ranks in all three ways, and gives the same outputs each time.

HOROVOD_LM_REPEATS=10 python -m pytest tests/jupyter/test_three_ways.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from horovod_lm.teaching.notebooks import read_notebook
from tests.conftest import ROOT
from tests.jupyter.conftest import needs_horovod

REPEATS = int(os.environ.get("HOROVOD_LM_REPEATS", "1"))
REDUCE = """import horovod.torch as hvd
import torch

hvd.init()
hvd.allreduce(torch.ones(2) * (hvd.rank() + 1), name="sum", op=hvd.Sum)"""
CELLS = [
    "%load_ext horovod_lm.jupyter",
    f"%%horovodrun -np 2 --out totals\n{REDUCE}",
    "totals",
    "from horovod_lm.jupyter.live.cluster import HorovodCluster\n\n"
    "cluster = HorovodCluster(2).start()",
    f"%%px\n{REDUCE}",
    "%%px\nprint('rank', hvd.rank())\nmine = hvd.rank() * 10",
    "%%px\nif hvd.rank() == 1:\n    raise ValueError('boom')\nhvd.allreduce(torch.ones(1))",
    "cluster.restart_ranks()",
    "%px mine, hvd.size()",
    "cluster.stop()",
    "from horovod_lm.jupyter.launch import launch\n\n"
    "job = launch('configs/tiny.yaml', np=2, run_name='three_ways')\n_ = await job",
    "job.metrics()[['phase', 'step', 'tokens', 'loss']].round(4)",
]


pytestmark = [pytest.mark.horovod, pytest.mark.slow, needs_horovod]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
    "PYTHONPATH": str(ROOT),
}


def jupyter(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments, path.name]
    return subprocess.run(
        command, cwd=path.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def stored(tiny_project) -> Path:
    """The notebook, executed once by `jupyter execute`, with its outputs."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in CELLS])
    notebook.cells[6].metadata["tags"] = ["raises-exception"]
    path = tiny_project / "three_ways.ipynb"
    nbformat.write(notebook, path)
    finished = jupyter(path, "jupyter", "execute", "--inplace")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return path


def test_a_cell_and_live_ranks_give_the_same_rank_by_rank(stored):
    _, cell, values, _, live, printed, failed, _, kept, *_ = [
        [output for output in cell.outputs if output.get("name") != "stderr"]
        for cell in read_notebook(stored).cells
    ]
    assert [output.text for output in live] == ["[0] tensor([3., 3.])\n[1] tensor([3., 3.])\n"]
    assert cell == [] and values[0].data["text/plain"] == "[tensor([3., 3.]), tensor([3., 3.])]"
    assert [output.text for output in printed] == ["[0] rank 0\n[1] rank 1\n"]
    error = failed[-1]
    assert error.ename == "RankError"
    assert error.evalue.startswith("rank 1: ValueError: boom (line 3 of the cell)")
    assert "\n".join(error.traceback).count("Traceback") == 1
    # The engines are the same ones after a restart, with what they hold.
    assert [output.text for output in kept] == ["[0] (0, 2)\n[1] (10, 2)\n"]


@pytest.mark.timeout(120 + 90 * REPEATS)
def test_nbval_finds_the_same_outputs_each_time(stored):
    for _ in range(REPEATS):
        finished = jupyter(
            stored, "pytest", "--nbval", "--nbval-current-env", "-q", "--nbval-cell-timeout", "60",
            "-p", "no:cacheprovider",
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-1000:]
