"""Run the commands of set-up and build: progress, logs, time limits, interrupts, locks.

Standard library only: set-up uses this module before any package is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from horovod_lm.utils.errors import last_line
from horovod_lm.utils.progress import ProgressLine, format_seconds

TICK_SECONDS = 1.0
INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def pip_command(*arguments: str, python: str | Path = sys.executable) -> list[str]:
    """Return the command that calls the pip of an environment."""
    return [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def run_pip(*arguments: str) -> str:
    """Call this environment's pip; return why it failed, or an empty text."""
    done = subprocess.run(pip_command(*arguments), capture_output=True, text=True, errors="replace")
    return (last_line(done.stderr or done.stdout) or "no reason") if done.returncode else ""


def interrupt_on_termination() -> None:
    """Treat SIGTERM and SIGHUP like Ctrl-C: child processes are ended, temporary files removed."""
    for number in INTERRUPTS - {signal.SIGINT}:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def call(
    command: Sequence[str],
    tick: Callable[[], object] = bool,
    seconds: float = float("inf"),
    grace: float = 60,
    **options: Any,
) -> int:
    """Run a command to its end and return its exit code; it never outlives this call.

    The command runs in a session of its own. Ctrl-C in a terminal therefore reaches only this
    process, and the command gets exactly one SIGINT, sent from here: a second one would interrupt
    its cleaning up.

    Args:
        tick: called about once a second.
        seconds: the time limit.
        grace: seconds between SIGINT and SIGKILL, for the command and all its children.
        options: of `subprocess.Popen`.

    Raises:
        subprocess.TimeoutExpired: the command was ended at the time limit.
    """
    started, process = time.monotonic(), None
    try:
        # Signals wait until `process` is known, so that it can be ended.
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_reset_signals,
                **options,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(TICK_SECONDS, seconds))
            tick()
            if time.monotonic() - started >= seconds:
                raise subprocess.TimeoutExpired(command, seconds)
    finally:
        if process is not None and process.poll() is None:
            end_group(process, grace)


def _reset_signals() -> None:
    """Undo in a child what it inherits; a shell starts background jobs with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def end_group(process: subprocess.Popen[Any], grace: float) -> None:
    """Interrupt a process and its children once; kill what is left after `grace` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_step(title: str, command: Sequence[str], log: Path, **options: Any) -> bool:
    """Run a command with its output appended to `log`; return whether it succeeded.

    A terminal shows its time. `options` are those of `call`.
    """
    line, started = ProgressLine(), time.monotonic()

    def elapsed() -> str:
        return format_seconds(time.monotonic() - started)

    line.update(f"  {title} ...", keep=True)
    outcome = "stopped"
    try:
        with log.open("a", encoding="utf-8") as file:
            options |= {"stdout": file, "stderr": subprocess.STDOUT}
            code = call(command, lambda: line.update(f"  {title} ... {elapsed()}"), **options)
        outcome = "done" if code == 0 else "failed"
    finally:
        line.say(f"  {title}: {outcome} after {elapsed()}")
    return code == 0


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on a file until the block or the process ends.

    While another process holds it, print that `what` is running, and wait.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{what} is running; waiting for it...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
