"""The structure that the design promises: floors, one door to Horovod, files that can be read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "horovod_lm"
FILES = sorted(PACKAGE.rglob("*.py"))
# Lower floors never import from higher ones.
FLOORS = (
    ("utils",),
    ("models",),
    ("data",),
    ("checkpoint", "load", "optimization", "evaluate", "report", "train", "train_command",
     "elastic", "conversation", "text", "generate"),
    ("jupyter",),
)  # fmt: skip
# elastic.py replaces Horovod's own elastic state and must derive from it; it needs Horovod anyway.
DOORS_TO_HOROVOD = {
    "utils/distributed.py", "elastic.py", "jupyter/engine_side.py",
    "jupyter/framed_horovodrun.py", "jupyter/rendezvous.py",
}  # fmt: skip
# The contract's one name for a terminal and a notebook: only in a notebook does it look upstairs.
STAIRS_UP = {("generate.py", "horovod_lm.jupyter.playground")}
LONGEST_FUNCTION = 60  # lines, docstring included: one screen
# Command lines are tables of options, and lists of settings are lists.
MAY_BE_LONGER = {"_parser", "parse", "main", "build_parser"}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def floor_of(file: Path) -> int | None:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return next((number for number, rooms in enumerate(FLOORS) if first in rooms), None)


def imports(file: Path) -> set[str]:
    """Return the modules a file imports, also inside functions; not those for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_the_floors(file):
    own = floor_of(file)
    if own is None:
        return
    for module in imports(file):
        if any(name_of(file) == name and module.startswith(up) for name, up in STAIRS_UP):
            continue
        if module.startswith("horovod_lm."):
            other = floor_of(PACKAGE / (module.split(".")[1] + ".py"))
            assert other is None or other <= own, f"{name_of(file)} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_top_floor_knows_jupyter_and_figures(file):
    if not name_of(file).startswith("jupyter/"):
        tops = {module.split(".")[0] for module in imports(file)}
        assert not tops & {"IPython", "ipywidgets", "matplotlib", "nbclient", "nbformat"}


def test_horovod_has_one_door():
    users = {
        name_of(file)
        for file in FILES
        if any(module.split(".")[0] == "horovod" for module in imports(file))
    }
    assert "utils/distributed.py" in users and users <= DOORS_TO_HOROVOD


@pytest.mark.parametrize(
    "name",
    [
        "horovod_lm",
        "horovod_lm.utils.config",
        "horovod_lm.utils.machine",
        "horovod_lm.data.prepare",
    ],
)
def test_a_light_import_stays_light(name):
    code = f"import sys, {name}; assert not {{'torch', 'horovod'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("file", sorted((PACKAGE / "models").glob("*.py")), ids=name_of)
def test_model_files_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 360


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_fit_a_screen_and_public_ones_are_explained(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(file)} does not say what it is"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for scope in (tree, *classes):
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert lines <= LONGEST_FUNCTION or node.name in MAY_BE_LONGER, (node.name, lines)
            if not node.name.startswith("_") and scope is tree:
                assert docstring, f"{name_of(file)}: {node.name} has no docstring"


def test_every_distributed_line_of_training_is_tagged():
    """Each statement of train.py that goes through the door to Horovod stands at a tag."""
    lines = (PACKAGE / "train.py").read_text(encoding="utf-8").splitlines()
    uses = [
        number
        for number, line in enumerate(lines)
        if "distributed." in line and "import" not in line and "config.distributed" not in line
    ]
    assert len(uses) >= 10
    for number in uses:
        if "is_main_process" in lines[number] or "is_lost_rank_error" in lines[number]:
            continue
        near = "\n".join(lines[max(0, number - 3) : number + 1])
        assert "# Horovod:" in near, f"train.py:{number + 1}: {lines[number].strip()}"
