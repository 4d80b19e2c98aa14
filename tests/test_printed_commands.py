"""A printed command can be pasted: in any folder, without an active environment.

To check another command, let a test print it and pass it to `Shell.paste`. A command that is only
documented is executed by `test_readme.py`; `documented.py` lists the exceptions.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import HOROVODRUN, ROOT, Command, Finished
from tests.documented import ELSEWHERE, NOT_EXECUTED, documented, in_messages, shape

PACKAGE = ROOT / "horovod_lm"
# The rest of a line, starting with one of our programs; its path may have quotes and spaces.
PRINTED = re.compile(
    r"""(?:^|\s)((?:[^\s']|'[^']*')*(?:'/[^'\n]*)?\b(?:python[\d.]*|horovodrun)'? -.*)$""", re.M
)
TYPED = re.compile(r"python3? -m horovod_lm|(?<!%)horovodrun -(?:np|H)\b")
# Help and documentation use the plain names: their reader has activated the environment.
PLAIN = {"prog", "help", "description", "epilog"}
ACTIVATES_FIRST = {"environment.py"}  # set-up prints the line that activates above the command


class Shell:
    """A login shell in a folder, without this environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Command] = []

    def start(self, line: str) -> Command:
        """Start a pasted line."""
        passed_on = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        env = {**passed_on, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        env["OMP_NUM_THREADS"] = "1"
        self.started.append(Command(["bash", "-c", line], self.folder, env))
        return self.started[-1]

    def paste(self, line: str, timeout: float = 120) -> Finished:
        """Run a line to its end and check its exit code."""
        finished = self.start(line).wait(timeout)
        assert finished.code == 0, f"{line}\n{finished.output[-4000:]}"
        return finished


def printed_by(finished: Finished) -> list[str]:
    """Return the commands in the output of a command."""
    return PRINTED.findall(re.sub(r"^\[\d+\]<std\w+>:", "", finished.output, flags=re.M))


@pytest.fixture
def shell(tmp_path, tiny_project):
    """A shell in `other folder`, beside a project in `my project`."""
    shutil.copytree(tiny_project / "configs", tmp_path / "my project" / "configs")
    shutil.copytree(tiny_project / "data", tmp_path / "my project" / "data")
    (tmp_path / "other folder").mkdir()
    made = Shell(tmp_path / "other folder")
    yield made
    for command in made.started:
        command.kill()


@pytest.mark.horovod
@pytest.mark.slow
def test_a_run_in_another_folder_is_resumed_and_talks_as_printed(shell):
    run = shell.folder.parent / "my project" / "runs" / "it's mine"
    first = shell.start(
        f"'{HOROVODRUN}' -np 2 '{sys.executable}' -m horovod_lm.train"
        " --config '../my project/configs/tiny.yaml' --run-name \"it's mine\""
        " --set training.max_steps=150 --set training.num_epochs=20"
    )
    first.wait_until(lambda: "step 50/" in first.output(), timeout=90)
    first.process.send_signal(signal.SIGINT)
    [resume] = printed_by(first.wait(30))
    [talk] = printed_by(shell.paste(resume))
    assert "--resume " in resume and (run / "checkpoints" / "final_model.pt").is_file()
    assert len(shell.paste(f"{talk} --max-new-tokens 5 < /dev/null").output.strip()) > 0


@pytest.mark.horovod
@pytest.mark.slow
def test_an_elastic_call_works_as_printed(shell):
    discovery = f"'{sys.executable}' -m horovod_lm.launch.elastic_hosts 'my hosts' --workers 2"
    config = "--config '../my project/configs/tiny.yaml' --set training.max_steps=5"
    [call] = printed_by(shell.paste(f"{discovery} {config}"))
    [talk] = printed_by(shell.paste(call))
    assert "horovod_lm.generate" in talk


def plain_texts(nodes: list[ast.AST]) -> set[int]:
    """Return the nodes of a module's docstrings and of the texts of --help."""
    helps = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg in PLAIN]
    names = {node.id for node in helps if isinstance(node, ast.Name)}
    helps += [node.value for node in nodes if isinstance(node, ast.Assign)
              and getattr(node.targets[0], "id", None) in names]  # fmt: skip
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    docstrings = [node for node in docstrings if isinstance(node, ast.Constant)]
    return {id(part) for node in helps + docstrings for part in ast.walk(node)}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_messages_take_their_commands_from_one_place(file):
    """`command()` knows the program's path and quotes; a typed command does not."""
    if file.name in ACTIVATES_FIRST:
        return
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    texts = [node for node in nodes if isinstance(node, ast.Constant)]
    typed = [node for node in texts if isinstance(node.value, str) and TYPED.search(node.value)]
    plain = plain_texts(nodes)
    assert [(node.lineno, node.value) for node in typed if id(node) not in plain] == []


def test_the_lists_of_commands_that_are_executed_elsewhere_or_not_at_all_are_right():
    lines = documented() | in_messages()
    targets = re.findall("^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {line.split()[1] for line in lines if line.startswith("make ")} <= {*targets}
    for line in lines:  # of what is not executed, the files exist at least
        for word in re.findall(r"\b(?:tests|configs|notebooks)/[\w/]+\.(?:py|yaml|ipynb)\b", line):
            assert "NAME" in word or (ROOT / word).is_file(), line
    assert [start for start in NOT_EXECUTED if not any(re.match(start, one) for one in lines)] == []
    shapes = {shape(line) for line in lines}
    assert [line for line in ELSEWHERE if shape(line) not in shapes] == []
    for line, file in ELSEWHERE.items():
        module, options = shape(line)[1], [word for word in line.split() if word[0] == "-"][1:]
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert module.rpartition(".")[2] in text and all(one in text for one in options), line
