"""The structure of the package: layers, one module that calls Horovod, functions of one screen."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "horovod_lm"
FILES = sorted(PACKAGE.rglob("*.py"))
# A folder imports only from folders before it in this list.
LAYERS = (
    "utils", "models", "data", "training", "generation", "analysis", "launch", "setup",
    "train", "generate", "jupyter", "teaching",
)  # fmt: skip
# elastic.py subclasses Horovod's elastic state; the others run in processes that have Horovod.
USERS_OF_HOROVOD = {
    "utils/distributed.py", "training/elastic.py", "jupyter/live/rank_loop.py",
    "jupyter/live/cluster.py", "jupyter/run_cell/framed_horovodrun.py", "launch/slurm.py",
}  # fmt: skip
# Methods of the public contract that need a higher layer.
IMPORTS_UPWARDS = {
    ("models/transformer_lm.py", "horovod_lm.generation.sampling"),
    ("generate.py", "horovod_lm.jupyter.widgets.playground"),
}
MOST_MODULES = 12  # in a folder
LONGEST_FUNCTION = 60  # lines without the docstring: one screen


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(file: Path) -> int | None:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return LAYERS.index(first) if first in LAYERS else None


def imports(file: Path) -> set[str]:
    """Return the modules a file imports, also inside functions, but not for type checkers."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    blocks = [
        node for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]  # fmt: skip
    skipped = [node for block in blocks for node in ast.walk(block)]
    found: set[str] = set()
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_the_layers_and_few_modules_use_horovod_or_jupyter(file):
    own, modules = layer_of(file), imports(file)
    allowed = tuple(up for name, up in IMPORTS_UPWARDS if name == name_of(file))
    for module in modules:
        if own is not None and module.startswith("horovod_lm.") and not module.startswith(allowed):
            other = layer_of(PACKAGE / (module.split(".")[1] + ".py"))
            assert other is None or other <= own, f"{name_of(file)} imports {module}"
    packages = {module.split(".")[0] for module in modules}
    assert "horovod" not in packages or name_of(file) in USERS_OF_HOROVOD
    if not name_of(file).startswith(("jupyter/", "teaching/")):
        assert not packages & {"IPython", "ipywidgets", "matplotlib", "nbclient", "nbformat"}


def test_no_module_imports_itself_through_others():
    names = {module_of(file): file for file in FILES}
    upwards = {up for _, up in IMPORTS_UPWARDS}
    graph = {
        name: {module for module in imports(file) - upwards if module in names and module != name}
        for name, file in names.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_a_folder_holds_few_modules():
    for folder in {file.parent for file in FILES}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{name_of(folder)} holds {len(modules)} modules"


SHOW_HELP = """
import runpy, sys
import horovod_lm, horovod_lm.data.prepare, horovod_lm.utils.machine
for module in ("train", "generate", "data"):
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(f"horovod_lm.{module}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
    assert not {"torch", "horovod"} & set(sys.modules), module
"""


def test_help_and_modules_without_tensors_do_not_import_torch():
    done = subprocess.run([sys.executable, "-c", SHOW_HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m horovod_lm.") == 3


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_fit_a_screen_and_public_ones_have_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(file)} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert lines <= LONGEST_FUNCTION, (node.name, lines)
            public = node in tree.body and not node.name.startswith("_")
            assert docstring or not public, f"{name_of(file)}: {node.name} has no docstring"


def test_every_distributed_line_of_training_is_tagged():
    """Each statement of the trainer that calls utils/distributed.py has the tag `# Horovod:`."""
    lines = (PACKAGE / "training" / "trainer.py").read_text(encoding="utf-8").splitlines()
    exempt = ("import", "config.distributed", "is_main_process", "is_lost_rank_error")
    uses = [
        number
        for number, line in enumerate(lines)
        if "distributed." in line and not any(word in line for word in exempt)
    ]
    assert uses
    for number in uses:
        near = "\n".join(lines[max(0, number - 3) : number + 1])
        assert "# Horovod:" in near, f"trainer.py:{number + 1}: {lines[number].strip()}"
