"""The commands of documents, pages, --help and messages, and which of them the tests execute.

`test_readme.py` executes those of the README and what `not_yet_executed` returns. Every other one
is covered by a command of the same shape, or stands below.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator

from tests.conftest import ROOT

PROGRAMS = (
    r"(?:[A-Z_]+=\S+ )?(?:horovodrun -|python3? (?=-m |\S+\.py)|make [a-z]|pytest |source |sudo |"
    r"pip i|ruff |apt-get |conda |kubectl |sbatch |ray j)"
)
# A command, and the test that executes one of its shape.
ELSEWHERE = {
    "python -m horovod_lm.setup.doctor": "setup/test_doctor.py",
    "python -m horovod_lm.setup.doctor --json": "setup/test_doctor.py",
    "python -m horovod_lm.setup.install_horovod": "setup/test_install_horovod.py",
    "python -m horovod_lm.setup.install_horovod --force": "setup/test_build.py",
    "python -m horovod_lm.launch.hosts --config X": "launch/test_hosts.py",
    "python -m horovod_lm.launch.slurm python --config X": "launch/test_slurm.py",
    "python -m horovod_lm.teaching.classroom grade X --csv X": "teaching/test_classroom.py",
    "python -m horovod_lm.teaching.notebooks X --in-place": "teaching/test_runner.py",
    "python -m horovod_lm.teaching.notebooks X --out X": "teaching/test_runner.py",
    "python -m horovod_lm.train X": "test_printed_commands.py",  # how to resume a run
}
# The beginning of a command, and why no test executes it.
NOT_EXECUTED = {
    r"make [a-z]+": "takes minutes or a network; `make machines` executes set-up and example",
    r"pytest |(\w+=\S+ )?python tests/|ruff ": "tests, measurements, changes of the working copy",
    r"source ": "test_readme.py begins with it",
    r"sudo |apt-get |pip install|conda |python -m pip": "installs packages",
    r"kubectl |sbatch |ray ": "needs a scheduler; tests/launch executes what is submitted",
    r"python -m horovod_lm\.(jupyter\.run_cell|training\.host_check)": "only the package starts it",
    r".* train\.py|horovodrun -np N|.*…": "stands for the reader's own program",
    r".*install_horovod --target": "compiles for minutes; `make gpu` executes it",
    r"horovodrun .*configs/config\.yaml": "needs GPUs and a download",
    r"horovodrun .*/etc/mpi": "the first line of a command that test_job_files.py executes",
    r"python -m horovod_lm\.generate .*--interactive": "a conversation; test_chat.py has one",
    r"python -m horovod_lm\.(train|generate|data|launch\.hosts)( --run)?$": "a name, no call",
    r"python -m horovod_lm\.(setup\.doctor --hosts|launch\.slurm)$": "a name, no call",
}


def not_yet_executed(executed: str) -> list[str]:
    """Return a command of each shape that is neither in the text `executed` nor listed above."""
    shapes = {shape(line) for line in [*commands_in(executed), *ELSEWHERE]}
    lines = []
    for line in sorted(documented() | in_messages()):
        if not any(re.match(start, line) for start in NOT_EXECUTED) and shape(line) not in shapes:
            shapes.add(shape(line))
            lines.append(line)
    return lines


def shape(line: str) -> tuple[str, ...]:
    """Return the launcher, the module, its subcommand and its options, without their values."""
    words = shlex.split(line)
    module = next((word for word in words if word.startswith("horovod_lm.")), "")
    after = words[words.index(module) + 1 :] if module else []
    subcommand = [word for word in after[:1] if word.isalpha() and word.islower()]
    options = {word for word in after if word.startswith("--")} - {"--run-name"}
    return (words[0], module, *subcommand, *sorted(options))


def documented() -> set[str]:
    """Return the commands of documents, configurations, pages, --help and docstrings."""
    return {line for text in _texts() for line in commands_in(text)}


def commands_in(text: str) -> list[str]:
    """Return the commands on indented lines and between backticks, each as one line."""
    text = re.sub(r"\\\n", " ", text)
    lines = re.findall(rf"^ {{2,}}({PROGRAMS}.*?)(?: +#.*)?$", text, re.MULTILINE)
    lines += re.findall(rf"`({PROGRAMS}[^`]*)`", text)
    return [" ".join(line.split()) for line in lines]


def in_messages() -> set[str]:
    """Return the commands that messages get from `utils.cli.command`, with X for what varies."""
    constants = {
        node.targets[0].id: node.value.value
        for node in _nodes()
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    lines = set()
    for node in _nodes():
        if isinstance(node, ast.Call) and node.args and "command" in _names(node.func):
            words = [
                constants.get(getattr(word, "id", None), getattr(word, "value", None))
                for word in node.args
            ]
            texts = [word if isinstance(word, str) else "X" for word in words]
            lines.add(" ".join(["python", "-m", *texts]))
    return lines


def _names(function: ast.expr) -> tuple[object, object]:
    return getattr(function, "id", None), getattr(function, "attr", None)


def _nodes() -> Iterator[ast.AST]:
    for path in (ROOT / "horovod_lm").rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def _texts() -> Iterator[str]:
    names = ["README.md", "CONTRIBUTING.md", "docs/teaching.md", "environment.yml"]
    paths = [ROOT / name for name in names]
    for path in [*paths, *(ROOT / "configs").rglob("*.*"), *(ROOT / "tests").glob("*/README.md")]:
        yield re.sub("^#", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for path in [*ROOT.glob("*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield "".join(cell["source"])
    for node in _nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
