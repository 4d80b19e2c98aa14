"""In a real kernel, a command that fails stops the page; programs are this environment's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.jupyter.conftest import Kernel

SAYS = "echo sa''id; exit 3"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel as an editor starts it: the environment's programs are not on PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/usr/bin:/bin")
        started = Kernel(tmp_path_factory.mktemp("a folder"))
    started.run("%load_ext horovod_lm.jupyter")
    yield started
    started.close()


def complaint(kernel: Kernel, code: str) -> str:
    """Run a cell that must fail; return what the page shows of the error."""
    kernel.run(code)
    assert kernel.error is not None, f"no error from {code}"
    assert kernel.error["ename"] == "CommandError"
    [shown] = kernel.error["traceback"]
    return shown


@pytest.mark.parametrize("command", ["!{}", "lines = !{}", "!!{}", "%sx {}", "%system {}"])
def test_a_command_that_fails_stops_the_page(kernel, command):
    kernel.run("lines = ['of an earlier run']")
    shown = complaint(kernel, f"{command.format(SAYS)}\nprint('went on')")
    assert shown.startswith(f"CommandError: this command ended with exit code 3: {SAYS}")
    assert "went on" not in kernel.text
    # What the command has printed stands on the page, or else with the error.
    assert ("said" in kernel.text) != ("its last lines:\n    said" in shown)
    assert kernel.run("print(_exit_code)") == "3\n"


def test_a_command_that_is_killed_or_missing_is_named(kernel):
    assert "was killed by SIGKILL" in complaint(kernel, "!kill -9 $$")
    assert "was killed by SIGTERM" in complaint(kernel, "lines = !kill $$")
    assert "exit code 127: no-such-program" in complaint(kernel, "!no-such-program")


def test_a_command_that_ends_well_is_as_before_and_none_runs_in_the_background(kernel):
    code = (
        "def f(local):\n    lines = !echo {local} {word}; echo more >&2\n    return lines\n"
        "word = 'b'\nprint(*f('a'), sep='|')\n!printf '%s' $word\nprint(_exit_code)"
    )
    assert kernel.run(code) == "a b|more\nb0\n"
    assert kernel.run("!false || true\nlines = !printf 'x\\ny'\nprint(lines.n, lines.l)") == (
        "x\ny ['x', 'y']\n"
    )
    kernel.run("!sleep 9 &")
    assert kernel.error["ename"] == "ConfigError" and "leave out the &" in kernel.error["evalue"]


def test_a_page_finds_this_environments_programs(kernel):
    lines = kernel.run("!command -v python; command -v horovodrun").splitlines()
    assert [Path(line).parent for line in lines] == [Path(sys.executable).parent] * 2
    kernel.run("%reload_ext horovod_lm.jupyter")
    path = kernel.run("import os; print(os.environ['PATH'])").strip().split(":")
    assert path.count(str(Path(sys.executable).parent)) == 1
