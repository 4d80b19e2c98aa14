"""Run a long build: its percentage on the screen, its output in a log, and its errors explained."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from horovod_lm.utils.errors import UserError

PERCENT = re.compile(r"\[\s*(\d{1,3})%\] (?:Building|Linking|Built)")
ERROR = re.compile(
    r"\berror\s*:|CMake Error|\bfatal\s*:|undefined reference|cannot find -l|Error: "
    r"|No space left on device|[Cc]annot allocate memory|Killed"
)
NOISE = re.compile(r"subprocess-exited|metadata-generation-failed|ERROR: Failed|CalledProcessError")
SOURCE_LINE = re.compile(r"\s*\d* +\| ")  # GCC's copy of the source, with a caret below
BLOCKS_SHOWN, LINES_OF_A_BLOCK = 3, 8

# (what the log says, what to do about it); the first that is found is shown.
CURES = (
    (
        r"No space left on device",
        "free some disk space, or put the cache elsewhere: HOROVOD_LM_CACHE=/a/larger/disk",
    ),
    (
        r"Killed signal|internal compiler error|[Cc]annot allocate memory|out of memory",
        "the compiler ran out of memory: run again with --jobs 1",
    ),
    (r"Python\.h: No such file", "Python's headers are missing: apt-get install python3-dev"),
    (r"Could NOT find NCCL", "NCCL's library was not found: set HOROVOD_NCCL_HOME, or --no-nccl"),
    (r"Could NOT find MPI", "MPI does not compile: install libopenmpi-dev, or leave out --mpi"),
    (
        r"Unsupported gpu architecture|unsupported GNU version",
        "this CUDA does not support this GPU or this compiler: install another CUDA build of torch,"
        " name another compiler in CXX, or build without NCCL: --no-nccl",
    ),
    (
        r"You need C\+\+\d+|unrecognized command.line option .-std=",
        "the C++ compiler is too old for this torch: install a newer one and name it in CXX",
    ),
    (r"CMake \d\S* or higher is required", "CMake is too old: python -m pip install -U cmake"),
)
OTHERWISE = "no fix is known for this error; another compiler, named in CXX, may not have it"


def run_with_progress(
    command: list[str], env: dict[str, str], log: Path, title: str, stream: TextIO | None = None
) -> None:
    """Run a build to its end, show its percentage, and write all its output to `log`.

    Args:
        command: the build; an interrupt ends it and every process that it started.
        env: its environment variables.
        log: the file for its output.
        title: what is built.
        stream: where the percentage is shown: one changing line on a terminal, elsewhere a line
            for each tenth; None is stdout.

    Raises:
        UserError: it failed; with its errors, what to do, and the path of the log.
    """
    stream = stream or sys.stdout
    started, shown = time.monotonic(), -1
    start, end = ("\r\x1b[K", "") if stream.isatty() else ("", "\n")

    def show(state: str, end: str = "\n") -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        stream.write(f"{start}  {title}: {state} after {minutes}m{seconds:02d}s{end}")
        stream.flush()

    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                found = PERCENT.search(line)
                # Parallel compilers finish out of order: the percentage only rises.
                if found and int(found[1]) // (1 if start else 10) > shown:
                    shown = int(found[1]) // (1 if start else 10)
                    show(f"{found[1]} % compiled", end)
            code = process.wait()
        except BaseException:
            _stop_group(process)
            show("stopped")
            raise
    show("built" if code == 0 else "failed")
    if code != 0:
        raise UserError(explain_failure(log))


def explain_failure(log: Path) -> str:
    """Return the errors of a failed build as its tools printed them, what to do, and the log."""
    lines = log.read_text(encoding="utf-8").splitlines()
    blocks: list[list[str]] = []
    for number, line in enumerate(lines):
        if ERROR.search(line) and not NOISE.search(line):
            block = [line]
            for after in lines[number + 1 : number + LINES_OF_A_BLOCK]:
                deeper = _indent(after) > _indent(line) or not after.strip()
                if ERROR.search(after) or not (deeper or SOURCE_LINE.match(after)):
                    break
                block.append(after)
            blocks.append(block)
    chosen = sum(blocks[:BLOCKS_SHOWN], []) or lines[-15:]
    said = "\n".join(f"  | {line}" for line in chosen if line.strip())
    text = "\n".join(lines)
    cure = next((cure for pattern, cure in CURES if re.search(pattern, text)), OTHERWISE)
    return f"the build failed:\n{said}\nWhat to do: {cure}\nThe full log: {log}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _stop_group(process: subprocess.Popen[str]) -> None:
    """End the build and every compiler that it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except ProcessLookupError:
        pass
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
