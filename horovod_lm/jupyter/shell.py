"""`!command` in a notebook: it finds this environment's programs, and raises an error if it fails.

IPython ignores the exit code of `!command` and of `lines = !command`, so the cells below would read
the files of an earlier run. Write `!command || true` where a command may fail.
"""

from __future__ import annotations

import os
import subprocess
import sys

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils import process
from IPython.utils.text import LSString, SList

from horovod_lm.utils.cli import program
from horovod_lm.utils.errors import ConfigError, UserError, how_it_ended

LINES_SHOWN = 10


class CommandError(UserError):
    """A shell command of a notebook ended with an exit code that is not 0."""


def put_programs_on_path() -> None:
    """Make `python` and `horovodrun` this environment's, also where it is not activated."""
    if any(os.path.isabs(program(name)) for name in ("python", "horovodrun")):
        folder = os.path.dirname(sys.executable)
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])


def stop_where_a_command_fails(shell: InteractiveShell) -> None:
    """Make `!command` and `lines = !command` raise a `CommandError` when the command fails.

    As in any shell, the exit code of a pipe is that of its last command.

    Args:
        shell: a kernel's. IPython's own `system_raise_on_error` is newer than Python 3.10.
    """

    def system(line: str) -> None:
        line = _runnable(shell.var_expand(line, depth=1))
        _check(shell, line, process.system(line))  # its output has been shown

    def getoutput(line: str, split: bool = True, depth: int = 0) -> SList | LSString:
        line = _runnable(shell.var_expand(line, depth=depth + 1))
        done = subprocess.run(
            line, shell=True, executable=os.environ.get("SHELL"), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        _check(shell, line, done.returncode, done.stdout)
        return SList(done.stdout.splitlines()) if split else LSString(done.stdout)

    setattr(shell, "system", system)  # noqa: B010  a method, for a type checker
    setattr(shell, "getoutput", getoutput)  # noqa: B010


def _runnable(line: str) -> str:
    if line.rstrip().endswith("&"):
        raise ConfigError("a page waits for its commands: leave out the & at the end")
    return line


def _check(shell: InteractiveShell, line: str, code: int, output: str = "") -> None:
    code = 128 - code if code < 0 else code  # killed by a signal: the exit code of a shell
    shell.user_ns["_exit_code"] = code
    if code:
        last = output.strip().splitlines()[-LINES_SHOWN:]
        shown = "".join(f"\n    {text}" for text in ["its last lines:", *last]) if last else ""
        raise CommandError(f"this command {how_it_ended(code)}: {line.strip()}{shown}")
