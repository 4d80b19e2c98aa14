"""A job: one run of horovodrun, described (`JobSpec`) and started (`JobProcess`)."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.jupyter.run_cell.framed_horovodrun import SECONDS_TO_AGREE
from horovod_lm.jupyter.run_cell.job_result import JobResult
from horovod_lm.jupyter.run_cell.processes import LONGEST_KILL, Processes
from horovod_lm.utils.cli import command as shell_command
from horovod_lm.utils.errors import DistributedError
from horovod_lm.utils.machine import available_cores

HOROVODRUN = "horovod_lm.jupyter.run_cell.framed_horovodrun"
NAME = "horovodrun"
CELL_GRACE_PERIOD = 2.0  # seconds that ranks have to end after SIGTERM
COMMAND_GRACE_PERIOD = 8.0  # the same for a command, which may save something
# Variables for the kernel alone, and those that would make ranks of what a rank has started.
_NOT_INHERITED = re.compile(
    r"^(HOROVOD_(RANK|SIZE|LOCAL_.*|CROSS_.*|HOSTNAME|GLOO_RENDEZVOUS.*)|MPLBACKEND|JPY_.*|PYDEVD_.*)$"
)
_noted: set[str] = set()


@dataclass
class JobSpec:
    """What to run, where, and how.

    Attributes:
        size: the number of ranks.
        call: horovodrun with its options, and what each rank runs.
        env: environment variables of every rank, on top of the kernel's.
        what: a name for it in sentences.
        elastic: whether ranks may come and go.
        cell_folder: what `rank_cell.write_cell` has filled, where a cell is run.
        timeout: the time limit in seconds; 0: none.
        grace_period: seconds between SIGTERM and SIGKILL when it is stopped.
        log_dir: where each rank's output is kept, as `console-rankN.log`; None: nowhere.
        cwd: the working directory.
    """

    size: int
    call: list[str]
    env: dict[str, str] = field(default_factory=dict)
    what: str = "the cell"
    elastic: bool = False
    cell_folder: Path | None = None
    timeout: float = 0.0
    grace_period: float = CELL_GRACE_PERIOD
    log_dir: Path | None = None
    cwd: str = field(default_factory=os.getcwd)


class JobProcess:
    """The processes of one job, which end with the kernel at the latest.

    Args:
        spec: what to run.
        on_event: called with each event of the supervisor, in a thread of its own; the last one is
            `{"event": "closed"}`.

    Attributes:
        result: what is known so far.
        seconds: how long it ran; 0 while it runs.
        ended: resolved with the result when no process of the job is left.

    Raises:
        DistributedError: Horovod is not installed.
    """

    def __init__(
        self, spec: JobSpec, on_event: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        require_horovod()
        self._spec, self._on_event = spec, on_event
        self.result = JobResult(spec.size, spec.what, spec.timeout, spec.elastic)
        self.ended: Future[JobResult] = Future()
        self.seconds = 0.0
        self._started = time.monotonic()
        self._logs: dict[int, TextIO] = {}
        env = {**inherited(), **spec.env}
        if spec.cell_folder is not None:
            env[rank_cell.VARIABLE] = str(spec.cell_folder)
        if spec.timeout:
            env[rank_cell.DEADLINE] = str(time.time() + spec.timeout)
        at = next(i for i, word in enumerate(spec.call) if Path(word).name == NAME)
        call = [*spec.call[:at], sys.executable, "-m", HOROVODRUN, *spec.call[at + 1 :]]
        self._processes = Processes(self._hear)
        self._processes.start(
            NAME, call, env, cwd=spec.cwd,
            grace_period=spec.grace_period, limit=spec.timeout,
            ranks=1 if spec.elastic else spec.size,
        )  # fmt: skip

    def terminate(self) -> None:
        """Stop every rank: SIGTERM, the grace period, SIGKILL. Return at once."""
        self._processes.stop(NAME)

    def stop(self) -> JobResult:
        """Stop every rank, and return when no process is left."""
        self.terminate()
        return self.wait(self._spec.grace_period + 2 * LONGEST_KILL)

    def wait(self, timeout: float | None = None) -> JobResult:
        """Wait for the end. Raises TimeoutError if it does not come within `timeout` seconds."""
        return self.ended.result(timeout)

    def _hear(self, event: dict[str, Any]) -> None:
        try:
            self._note(event)
            if self._on_event is not None:
                self._on_event(event)
        finally:
            if event["event"] == "ended":
                self._processes.hang_up()
            elif event["event"] == "closed":
                self.ended.set_result(self.result)

    def _note(self, event: dict[str, Any]) -> None:
        self.result.add(event)
        rank = event.get("rank")
        if event["event"] == "output" and rank is not None:
            self._log(rank, event["text"])
        elif event["event"] == "rank_ended" and not self._spec.elastic:
            self._processes.stop(NAME, "failed", after=SECONDS_TO_AGREE)
        elif event["event"] == "ended" and self._spec.cell_folder is not None:
            self.result.read_reports(self._spec.cell_folder)
        elif event["event"] == "closed":
            self.seconds = time.monotonic() - self._started
            for log in self._logs.values():
                log.close()

    def _log(self, rank: int, text: str) -> None:
        if self._spec.log_dir is None:
            return
        try:
            if rank not in self._logs:
                path = self._spec.log_dir / f"console-rank{rank}.log"
                self._logs[rank] = open(path, "a", encoding="utf-8", buffering=1)
            self._logs[rank].write(text)
        except OSError:  # a full disk ends the log, not the job
            self._spec.log_dir = None


def require_horovod() -> None:
    """Raise a DistributedError if Horovod is not installed."""
    if importlib.util.find_spec("horovod") is None:
        raise DistributedError(
            f"Horovod is not installed: run {shell_command('horovod_lm.setup.install_horovod')}"
        )


def inherited() -> dict[str, str]:
    """Return the kernel's environment without the variables that are for the kernel alone."""
    env = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
    commands = str(Path(sys.executable).parent)
    return {**env, "PATH": os.pathsep.join([commands, env.get("PATH", "")])}


def threads_per_rank(ranks: int, threads: int | None, option: str = "") -> int:
    """Return the number of CPU threads of each rank; warn if they are more than the cores.

    Args:
        ranks: how many of them are on this host.
        threads: what the user asks for; None: an equal share of the cores, at least 1.
        option: how the user sets it, for a note that is printed once; "": no note.
    """
    cores = available_cores()
    share = threads or max(1, cores // ranks)
    if option and option not in _noted and threads is None and ranks > 1:
        _noted.add(option)
        print(
            f"note: the ranks share this machine's cores evenly; {option} gives each N",
            file=sys.stderr,
        )
    if ranks * share > cores:
        print(
            f"warning: {ranks} ranks with {share} threads each want {ranks * share} cores, and"
            f" {cores} are here: they will take turns, and run slower than fewer would",
            file=sys.stderr,
        )
    return share
