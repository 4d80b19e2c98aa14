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


@pytest.fixture
def stored(tiny_project) -> Path:
    """The notebook, executed once and stored."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in CELLS])
    notebook.cells[6].metadata["tags"] = ["raises-exception"]
    path = tiny_project / "three_ways.ipynb"
    nbformat.write(notebook, path)
    execute(path, path)
    return path


@pytest.mark.horovod
@pytest.mark.slow
@needs_horovod
@pytest.mark.timeout(120 + 90 * REPEATS)
def test_a_notebook_of_all_three_ways_passes_nbval(stored):
    error = read_notebook(stored).cells[6].outputs[-1]
    assert error.evalue.startswith("rank 1: ValueError: boom (line 3 of the cell)")
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    for _ in range(REPEATS):
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q",
             "--nbval-cell-timeout", "60", "-p", "no:cacheprovider", stored.name],
            cwd=stored.parent, env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-1000:]
