"""A job: one run of horovodrun, described (`JobSpec`) and started (`JobProcess`)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.jupyter.run_cell.job_result import JobResult
from horovod_lm.jupyter.run_cell.processes import SupervisedProcess
from horovod_lm.utils.cli import command as shell_command
from horovod_lm.utils.errors import ConfigError, DistributedError
from horovod_lm.utils.machine import available_cores

HOROVODRUN = "horovod_lm.jupyter.run_cell.framed_horovodrun"
MOST_RANKS_PER_CORE = 32


@dataclass
class JobSpec:
    """What to run, where, and how."""

    size: int  # the number of ranks
    call: list[str]  # horovodrun with its options, and what each rank runs
    env: dict[str, str] = field(default_factory=dict)  # of every rank, on top of the kernel's
    what: str = "the cell"  # its name in error messages
    elastic: bool = False  # whether ranks may come and go
    cell_folder: Path | None = None  # that `rank_cell.write_cell` has filled; None: no cell is run
    grace_period: float = 2.0  # seconds between SIGTERM and SIGKILL when it is stopped
    log_dir: Path | None = None  # gets each rank's output as `console-rankN.log`; None: no logs
    cwd: str = field(default_factory=os.getcwd)
    launcher: str = HOROVODRUN  # the module that runs instead of horovodrun, and reports events


class JobProcess:
    """The processes of one job, which end with the kernel at the latest.

    `on_event` is called with each event (see `processes`), in a thread of its own.

    Raises:
        DistributedError: Horovod is not installed.
    """

    def __init__(self, spec: JobSpec, on_event: Callable[[dict[str, Any]], None]) -> None:
        require_horovod()
        self._spec, self._on_event = spec, on_event
        self.result = JobResult(spec.size, spec.what, spec.elastic)  # what is known so far
        self.ended: Future[JobResult] = Future()  # has a result when no process of the job is left
        self.seconds = 0.0  # how long it ran; 0 while it runs
        self._started = time.monotonic()
        self._logs: dict[int, TextIO] = {}
        env = {**spec.env, "HOROVOD_GRACEFUL_TERMINATION_SECONDS": str(spec.grace_period)}
        if spec.cell_folder:
            env[rank_cell.VARIABLE] = str(spec.cell_folder)
        self._process = SupervisedProcess(
            [sys.executable, "-m", spec.launcher, *spec.call[1:]], self._hear, env,
            cwd=spec.cwd, grace_period=spec.grace_period, ranks=0 if spec.elastic else spec.size,
        )  # fmt: skip

    def terminate(self) -> None:
        """Stop every rank: SIGTERM, the grace period, SIGKILL. Return at once."""
        self._process.stop()

    def stop(self) -> JobResult:
        """Stop every rank, and return when no process is left."""
        self.terminate()
        return self.wait()

    def wait(self, timeout: float | None = None) -> JobResult:
        """Wait for the end. Raises TimeoutError if it does not come within `timeout` seconds."""
        return self.ended.result(timeout)

    def _hear(self, event: dict[str, Any]) -> None:
        has_ended = event["event"] == "ended"
        with contextlib.ExitStack() as always:  # whoever waits for the end must hear of it
            if has_ended:
                always.callback(self.ended.set_result, self.result)
            always.callback(self._on_event, event)
            self.result.add(event)
            if event["event"] == "output" and event["rank"] is not None:
                self._log(event["rank"], event["text"])
            if has_ended:
                self.seconds = time.monotonic() - self._started
                for rank, report in rank_cell.read_reports(self._spec.cell_folder).items():
                    self.result.take(rank, report)
                for log in self._logs.values():
                    with contextlib.suppress(OSError):  # a full disk
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


def stall_settings(seconds: int, gloo_timeout: int, longest_period: int) -> dict[str, str]:
    """Return Horovod's settings that end a job when ranks wait for a missing one.

    Args:
        seconds: how long they wait; 0: for ever.
        gloo_timeout: seconds after which a rank that does not answer is taken for lost.
        longest_period: seconds between two checks, which can print a warning, at most.
    """
    # Horovod: it checks once in each warning period, so only a period that divides the limit works.
    periods = range(longest_period, 0, -1)
    period = next(each for each in periods if seconds % each == 0) if seconds else 60
    return {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(period),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(seconds),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(gloo_timeout),
    }


def threads_per_rank(ranks: int, threads: int | None) -> int:
    """Return the number of CPU threads of each rank; warn if they are more than the cores.

    Args:
        ranks: how many of them are on this host.
        threads: what the user asks for; None: an equal share of the cores, at least 1.

    Raises:
        ConfigError: the ranks are too many for this host.
    """
    cores = available_cores()
    if ranks > MOST_RANKS_PER_CORE * cores:
        most = MOST_RANKS_PER_CORE * cores
        raise ConfigError(f"{ranks} ranks are too many: with {cores} cores, start at most {most}")
    share = threads or max(1, cores // ranks)
    if ranks * share > cores:
        print(
            f"warning: {ranks} ranks with {share} threads each want {ranks * share} cores, and"
            f" {cores} are here: they will take turns, and run slower than fewer would",
            file=sys.stderr,
        )
    return share
