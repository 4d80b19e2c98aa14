"""The ipyparallel engines that live ranks run in, and their controller."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ipyparallel
from IPython.core.profiledir import ProfileDir

from horovod_lm.jupyter.live import engine_side
from horovod_lm.jupyter.run_cell.job import inherited
from horovod_lm.jupyter.run_cell.job_result import how_it_ended
from horovod_lm.jupyter.run_cell.processes import Processes
from horovod_lm.utils.errors import DistributedError, last_line

CONTROLLER = "controller"
SECONDS_TO_START = 60.0


class Engines:
    """Engines on this host, which end with the notebook. Nothing listens beyond the loopback.

    Args:
        size: how many, one for each rank.
        threads: CPU threads of each.

    Attributes:
        frozen: seconds for which an engine had been stopped (SIGSTOP) when it was killed, by rank.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.size, self.frozen = size, dict[int, float]()
        self._threads = threads
        self._ids: list[int] = []  # ipyparallel's numbers, by rank
        self._pids_of_ids: dict[int, ipyparallel.AsyncResult] = {}
        self._client: Any = None
        self._output: dict[str, list[str]] = defaultdict(list)
        self._folder = Path(tempfile.mkdtemp(prefix="horovod-cluster-"))
        self.processes = Processes(self._hear)
        # Otherwise the engines and the controller would make the folders of a profile at once.
        ProfileDir.create_profile_dir(str(self._folder))
        for rank in range(size):
            self._start(rank)
        command = [
            sys.executable, "-m", "ipyparallel.controller", f"--profile-dir={self._folder}",
            "--usethreads", "--nodb", "--ping=1000", "--ip=127.0.0.1", "--log-level=ERROR",
        ]  # fmt: skip
        self.processes.start(CONTROLLER, command, inherited())

    def revive(self) -> None:
        """Replace engines that have ended, and wait until all are ready.

        Raises:
            DistributedError: one did not start.
        """
        for rank in self.ended():
            self._start(rank)
        connection = self._folder / "security" / "ipcontroller-client.json"
        if self._client is None:
            self._wait(lambda: engine_side.whole_json(connection) != "", "the controller")
            self._client = ipyparallel.Client(str(connection), timeout=SECONDS_TO_START)
        self._wait(self._all_came, "an engine")

    def send(self, rank: int, call: partial) -> ipyparallel.AsyncResult:
        """Ask one engine for a call, and return at once."""
        return self._client[self._ids[rank]].apply_async(call.func, *call.args)

    def ended(self) -> dict[int, int]:
        """Return the exit codes of engines that have ended, by rank, in the order of their ends."""
        ranks = {_name(rank): rank for rank in range(self.size)}
        codes = list(self.processes.codes.items())
        return {ranks[name]: code for name, code in codes if name in ranks}

    def output(self, rank: int) -> str:
        """Return what a rank's engines have written past Python's streams."""
        return "".join(self._output[_name(rank)])

    def kill(self, rank: int) -> None:
        """Kill an engine."""
        self.processes.signal(_name(rank), signal.SIGKILL)

    def interrupt(self) -> None:
        """Interrupt every engine as Ctrl-C does."""
        for rank in range(self.size):
            self.processes.signal(_name(rank), signal.SIGINT)

    def close(self) -> None:
        """End every process, and return when they are gone."""
        if self._client is not None:
            self._client.close()
        self.processes.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, rank: int) -> None:
        command = [
            sys.executable, "-m", engine_side.__name__, f"--profile-dir={self._folder}",
            f"--IPEngine.wait_for_url_file={SECONDS_TO_START}", "--IPEngine.enable_nanny=False",
            "--IPEngine.timeout=30", "--log-level=ERROR",
        ]  # fmt: skip
        paths = os.pathsep.join(path for path in sys.path if path)
        env = {**inherited(), "OMP_NUM_THREADS": str(self._threads), "PYTHONPATH": paths}
        self.frozen.pop(rank, None)
        self.processes.start(_name(rank), command, env)

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "output":
            self._output[event["name"]].append(event["text"])
        elif event["event"] == "frozen" and event["name"] != CONTROLLER:
            self.frozen[int(event["name"].split()[1])] = event["seconds"]

    def _all_came(self) -> bool:
        """Ask new engines for their process ids; return whether every rank has its engine."""
        for engine in set(self._client.ids) - set(self._pids_of_ids):
            self._pids_of_ids[engine] = self._client[engine].apply_async(os.getpid)
        found = {
            result.get(): engine
            for engine, result in self._pids_of_ids.items()
            if result.ready() and result.successful()
        }
        wanted = [self.processes.pids.get(_name(rank)) for rank in range(self.size)]
        self._ids = [found[pid] for pid in wanted if pid in found]
        return len(self._ids) == self.size

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not condition():
            for name, code in list(self.processes.codes.items()):
                last = last_line("".join(self._output[name]))
                raise DistributedError(f"{name} {how_it_ended(code)} before it was ready: {last}")
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"{what} did not start within {SECONDS_TO_START:g} s: call cluster.stop() and"
                    " cluster.start() when the machine has less to do"
                )
            time.sleep(0.02)


def _name(rank: int) -> str:
    return f"rank {rank}"
