"""The API notebook shows the whole contract: its headings in order, its calls, their defaults."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from nbformat import NotebookNode

from horovod_lm.generate import generate_text
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.teaching.notebooks import headings, read_notebook
from horovod_lm.utils.config import Config
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
ERRORS = {"ConfigError", "DataError", "CheckpointError", "DistributedError"}


@pytest.fixture(scope="module")
def page() -> NotebookNode:
    return read_notebook(ROOT / "horovod_transformer.API.ipynb")


@pytest.fixture(scope="module")
def code(page) -> str:
    return "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")


def printed_by(page: NotebookNode, identity: str) -> str:
    cell = next(cell for cell in page.cells if cell.id == identity)
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def calls_of_the_contract() -> set[str]:
    """Every name that the contract's snippets import from the package, read from their test."""
    tree = ast.parse(CONTRACT_TEST.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("horovod_lm")]
    names = {alias.name for node in ours for alias in node.names}
    return names - {"distributed"}  # a module


def test_the_headings_are_the_contracts(page):
    assert [(level, text) for _, level, text in headings(page)] == CONTRACT_HEADINGS


def test_every_call_of_the_contract_is_made(code):
    calls = calls_of_the_contract()
    assert {"TransformerLM", "run_distributed_training", "generate_text", "Config"} <= calls
    assert [name for name in sorted(calls) if not re.search(rf"\b{name}\(", code)] == []
    for call in ("hvd.DistributedOptimizer(", "hvd.broadcast_parameters(", ".generate("):
        assert call in code


@pytest.mark.parametrize(
    ("identity", "call"),
    [
        ("model-defaults", TransformerLM),
        ("generate-defaults", TransformerLM.generate),
        ("generation-defaults", generate_text),
    ],
)
def test_the_stored_defaults_are_those_of_the_code(page, identity, call):
    parameters = inspect.signature(call).parameters.values()
    wanted = [[p.name, repr(p.default)] for p in parameters if p.default is not p.empty]
    assert [line.split() for line in printed_by(page, identity).splitlines()] == wanted


def test_the_stored_settings_are_all_settings(page):
    printed = printed_by(page, "structure-defaults")
    sections = Config().model_dump(exclude={"seed", "project_root"})
    wanted = [
        [f"{section}:"] if name is None else [name, repr(value)]
        for section, settings in sections.items()
        for name, value in [(None, None), *settings.items()]
    ]
    assert [line.split(maxsplit=1) for line in printed.splitlines()] == wanted


def test_each_kind_of_error_is_shown_as_one_sentence(page):
    texts = [printed_by(page, cell.id) for cell in page.cells if cell.cell_type == "code"]
    shown = {name: re.findall(rf"^{name}: (.+)$", "\n".join(texts), re.M) for name in ERRORS}
    assert [name for name, sentences in shown.items() if not sentences] == []
    assert "Traceback" not in "".join(texts)


def test_two_ranks_have_run_and_nothing_is_left_behind(page):
    for identity in ("setup-run", "optimizer-run"):
        assert {line[:3] for line in printed_by(page, identity).splitlines()} == {"[0]", "[1]"}
    assert "average 1.5" in printed_by(page, "setup-run")
    assert printed_by(page, "optimizer-run").count("equal: True") == 2
    assert printed_by(page, page.cells[-1].id) == "left behind: False\n"
