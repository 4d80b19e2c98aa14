"""A long build, watched: one moving line on a terminal, a few plain lines elsewhere, a full log.

When the build fails, the lines that matter are picked out of thousands, with a cure if its kind
is known.
"""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from horovod_lm.utils.errors import UserError

PERCENT = re.compile(r"\[\s*(\d{1,3})%\] (?:Building|Linking|Built)")
STAGES = (
    (re.compile(r"Running CMake|The CXX compiler identification"), "configuring"),
    (re.compile(r"\[\s*\d+%\]"), "compiling"),
    (re.compile(r"creating '.*\.whl'|running install_lib"), "packing the wheel"),
)
TELLING = re.compile(
    r"\berror\b|CMake Error|No such file|No space left|not found|Killed|cannot allocate",
    re.IGNORECASE,
)
NOISE = re.compile(r"Wno-error|Werror|error_code|subprocess-exited|^-- |warning:", re.IGNORECASE)

# (what the log says, what to do about it); the first that is found is told.
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
    (r"Could NOT find NCCL", "NCCL's headers are missing: install libnccl-dev, or give --no-nccl"),
    (r"Could NOT find MPI", "MPI does not compile: install libopenmpi-dev, or leave out --mpi"),
    (
        r"You need C\+\+\d+|unrecognized command.line option .-std=",
        "the C++ compiler is too old for this torch: install a newer one and name it in CXX",
    ),
    (r"CMake \d\S* or higher is required", "CMake is too old: python -m pip install -U cmake"),
)
OTHERWISE = "the build may simply be run again; the log holds everything that was said"


class Progress:
    """What is shown while a build runs: stage, percent of the files compiled, time so far."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self.title = title
        self.stream = stream
        self.moving = stream.isatty()
        self.started = time.monotonic()
        self.stage = "unpacking"
        self.percent = 0
        self.shown: tuple[str, int] | None = None

    def read(self, line: str) -> None:
        """Take one line of the build's output into account."""
        for pattern, stage in STAGES:
            if pattern.search(line):
                self.stage = stage
        found = PERCENT.search(line)
        if found:
            self.percent = max(self.percent, int(found.group(1)))  # parallel jobs end out of order

    def show(self) -> None:
        """Draw the moving line, or print a plain one when the stage or the tenth has changed."""
        state = (self.stage, self.percent // 10 if self.stage == "compiling" else 0)
        if self.moving:
            self.stream.write(f"\r\x1b[K{self}")
        elif state != self.shown:
            self.stream.write(f"{self}\n")
        self.shown = state
        self.stream.flush()

    def finish(self, outcome: str) -> None:
        """Replace the moving line by a last, plain one."""
        clear = "\r\x1b[K" if self.moving else ""
        self.stream.write(f"{clear}  {self.title}: {outcome} after {self.elapsed()}\n")
        self.stream.flush()

    def elapsed(self) -> str:
        """The time so far, as 3m05s."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}m{seconds:02d}s"

    def __str__(self) -> str:
        percent = f" {self.percent:3d} %" if self.stage == "compiling" else ""
        return f"  {self.title}: {self.stage}{percent}  {self.elapsed()}"


def run_with_progress(
    command: list[str], env: dict[str, str], log: Path, title: str, stream: TextIO | None = None
) -> None:
    """Run a build to its end, showing how far it is, and keep all its output in `log`.

    Raises:
        UserError: it failed; with the telling lines, a cure, and the path of the log.
    """
    progress = Progress(title, stream or sys.stdout)
    lines: list[str] = []
    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for line in _lines_or_ticks(process):
                if line is not None:
                    lines.append(line)
                    kept.write(line + "\n")
                    progress.read(line)
                progress.show()
            code = process.wait()
        except BaseException:
            _stop_group(process)
            progress.finish("stopped")
            raise
    progress.finish("built" if code == 0 else "failed")
    if code != 0:
        raise UserError(explain_failure(lines, log))


def explain_failure(lines: list[str], log: Path) -> str:
    """The few lines of a failed build that say why, what to do, and where the rest is."""
    telling = [line.strip() for line in lines if TELLING.search(line) and not NOISE.search(line)]
    chosen = telling[:8] if telling else [line.strip() for line in lines[-15:]]
    text = "\n".join(lines)
    cure = next((cure for pattern, cure in CURES if re.search(pattern, text)), OTHERWISE)
    said = "\n".join(f"  | {line[:200]}" for line in chosen)
    return f"the build failed; it said:\n{said}\nWhat to do: {cure}\nThe full log: {log}"


def _lines_or_ticks(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """Each line of the output as it comes, and None after every second of silence."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=1.0):
                yield None
                continue
            chunk = os.read(pipe, 65536)
            if not chunk:
                break
            *complete, rest = (rest + chunk).split(b"\n")
            for line in complete:
                yield line.decode("utf-8", errors="replace")
    if rest:
        yield rest.decode("utf-8", errors="replace")


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """End the build and every compiler that it started."""
    import signal

    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except ProcessLookupError:
        pass
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
