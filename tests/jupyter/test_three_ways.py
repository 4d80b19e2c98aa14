"""One notebook that starts ranks in all three ways gives the same outputs each time.

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

from horovod_lm.jupyter.notebooks import execute, read_notebook
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
    "from horovod_lm.jupyter.cluster import HorovodCluster\n\ncluster = HorovodCluster(2).start()",
    f"%%px\n{REDUCE}",
    "%%px\nprint('rank', hvd.rank())\nmine = hvd.rank() * 10",
    "%%px\nif hvd.rank() == 1:\n    raise ValueError('boom')\nhvd.allreduce(torch.ones(1))",
    "cluster.restart_ranks()",
    "%%px\nmine, hvd.size()",
    "cluster.stop()",
    "from horovod_lm.jupyter.launch import launch\n\n"
    "job = launch('configs/tiny.yaml', np=2, run_name='three_ways')\n_ = await job",
    "job.metrics()[['phase', 'step', 'tokens', 'loss']].round(4)",
]


@pytest.fixture(scope="module")
def stored(tiny_project) -> Path:
    """The notebook, executed once and stored."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in CELLS])
    notebook.cells[6].metadata["tags"] = ["raises-exception"]
    path = tiny_project / "three_ways.ipynb"
    nbformat.write(notebook, path)
    execute(path, path)
    return path


pytestmark = [pytest.mark.horovod, pytest.mark.slow, needs_horovod]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
    "PYTHONPATH": str(ROOT),
}


def jupyter(stored: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments, stored.name]
    return subprocess.run(
        command, cwd=stored.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.timeout(120 + 90 * REPEATS)
def test_a_notebook_of_all_three_ways_passes_nbval(stored):
    error = read_notebook(stored).cells[6].outputs[-1]
    assert error.evalue.startswith("rank 1: ValueError: boom (line 3 of the cell)")
    for _ in range(REPEATS):
        finished = jupyter(
            stored, "pytest", "--nbval", "--nbval-current-env", "-q", "--nbval-cell-timeout", "60",
            "-p", "no:cacheprovider",
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-1000:]


def test_jupyter_execute_gives_the_same_outputs(stored):
    finished = jupyter(stored, "jupyter", "execute", "--output=again.ipynb")
    assert finished.returncode == 0, finished.stderr[-3000:]
    outputs, again = (
        [cell.outputs for cell in read_notebook(path).cells]
        for path in (stored, stored.with_name("again.ipynb"))
    )
    assert again == outputs
