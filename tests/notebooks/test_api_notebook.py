"""The API notebook shows the whole contract: its headings in order, its calls, its errors.

`test_pages_run.py` holds that its stored defaults and results are those of the code.
"""

from __future__ import annotations

import ast
import re

import pytest
from nbformat import NotebookNode

from horovod_lm.teaching.notebooks import headings, read_notebook
from tests.conftest import ROOT

CONTRACT_TEST = ROOT / "tests" / "test_contract.py"

# The headings of the contract's document, with their levels, in its order.
CONTRACT_HEADINGS = [
    (1, "Horovod Transformer Tutorial"),
    (2, "Table of Contents"),
    (3, "Hierarchy"),
    (2, "General Guidelines"),
    (2, "API Overview"),
    (2, "Model API"),
    (3, "TransformerLM Class"),
    (2, "Training API"),
    (3, "Main Training Function"),
    (3, "Checkpoint Management"),
    (2, "Data Loading API"),
    (3, "Loading Preprocessed Data"),
    (2, "Distributed Training API"),
    (3, "Horovod Setup"),
    (3, "Distributed Optimizer"),
    (2, "Text Generation API"),
    (3, "Loading Model for Generation"),
    (3, "Interactive Generation"),
    (2, "Configuration API"),
    (3, "Loading Configuration"),
    (3, "Configuration Structure"),
    (2, "Usage Examples"),
]
ERRORS = ("ConfigError", "DataError", "CheckpointError", "DistributedError")


@pytest.fixture(scope="module")
def page() -> NotebookNode:
    return read_notebook(ROOT / "horovod_transformer.API.ipynb")


def calls_of_the_contract() -> set[str]:
    """Every name that the contract's snippets import from the package, read from their test."""
    tree = ast.parse(CONTRACT_TEST.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("horovod_lm")]
    names = {alias.name for node in ours for alias in node.names}
    return names - {"distributed"}  # a module


def test_the_headings_are_the_contracts(page):
    assert [(level, text) for _, level, text in headings(page)] == CONTRACT_HEADINGS


def test_every_call_of_the_contract_is_made(page):
    code = "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")
    calls = calls_of_the_contract()
    assert {"TransformerLM", "run_distributed_training", "generate_text", "Config"} <= calls
    assert [name for name in sorted(calls) if not re.search(rf"\b{name}\(", code)] == []
    for call in ("hvd.DistributedOptimizer(", "hvd.broadcast_parameters(", ".generate("):
        assert call in code


def test_each_kind_of_error_is_shown_as_one_sentence(page):
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert [name for name in ERRORS if not re.search(rf"^{name}: .+$", printed, re.M)] == []
    assert "Traceback" not in printed
