"""The engines of live ranks that talk over MPI: one `mpirun` on this host starts them all."""

from __future__ import annotations

import os
import re
import shutil
import signal

from horovod_lm.jupyter import engine_side
from horovod_lm.jupyter.engines import Engines, engine_command, name_of
from horovod_lm.utils.cli import command
from horovod_lm.utils.errors import DistributedError

MPIRUN = "mpirun"
# Open MPI: whom it blames, in what it says before it ends all others.
_SIGNAL = re.compile(r"process rank (\d+) with PID \d+ on node \S+ exited on signal (\d+)")
_EXIT = re.compile(r"Process name: \[\[\d+,\d+\],(\d+)\]\s+Exit code:\s+(\d+)")
SETTINGS = {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"}


def why_not_here() -> str:
    """Return what is missing for ranks that talk over MPI, in one sentence; "" if nothing is."""
    build = command("horovod_lm.install_horovod", "--mpi")
    if shutil.which(MPIRUN) is None:
        return (
            'controller="mpi" needs Open MPI, and there is no mpirun on PATH; on Debian or Ubuntu:'
            f" apt-get install libopenmpi-dev openmpi-bin, then {build}; or leave it at"
            ' controller="gloo"'
        )
    if not engine_side.built_with_mpi():
        return (
            f'controller="mpi" needs a Horovod that was built with MPI: run {build},'
            ' or leave it at controller="gloo"'
        )
    return ""


class MpiEngines(Engines):
    """Engines that one `mpirun` holds together: when one of them dies, it ends the others.

    Args:
        size: how many.
        threads: CPU threads of each.

    Raises:
        DistributedError: there is no Open MPI, or Horovod was built without it.
    """

    def __init__(self, size: int, threads: int) -> None:
        reason = why_not_here()
        if reason:
            raise DistributedError(reason)
        self._old: set[int] = set()  # engines of an earlier mpirun
        super().__init__(size, threads)

    def revive(self) -> None:
        """Start all engines anew, but for the first time, and wait until they are there.

        MPI does not start again in a process where it has ended, so what they held is lost.

        Raises:
            DistributedError: one did not come.
        """
        if self.ids:
            names = [MPIRUN, *map(name_of, range(self.size))]
            self.processes.kill(MPIRUN)
            self._wait(lambda: MPIRUN in self.processes.codes, "mpirun's end", names)
            for name in names:
                self.processes.codes.pop(name, None)
            self._old |= set(self._asked)
            self._asked.clear()
            self._start_all()
        super().revive()

    def _start_all(self) -> None:
        self._said = len(self.processes.log(MPIRUN))
        folder = self.processes.folder
        # Each rank's words where `Processes.log` finds them.
        shell = f'exec "$@" >> "{folder}/rank-$OMPI_COMM_WORLD_RANK.log" 2>&1'
        as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command = [
            MPIRUN, *as_root, "--oversubscribe", "--bind-to", "none", "-np", str(self.size),
            "sh", "-c", shell, "sh", *engine_command(folder, "of-mpirun"),
        ]  # fmt: skip
        self.processes.start(MPIRUN, command, self._env())

    def _all_came(self) -> bool:
        """Ask newcomers for their place; return whether there is an engine for every rank."""
        for engine in set(self._client.ids) - set(self._asked) - self._old:
            self._asked[engine] = self._client[engine].apply_async(engine_side.mpi_place)
        found = {
            rank: (engine, pid)
            for engine, result in self._asked.items()
            if result.ready() and result.successful()
            for rank, pid in [result.get()]
        }
        if len(found) < self.size:
            return False
        self.ids = [found[rank][0] for rank in range(self.size)]
        for rank in range(self.size):
            self.processes.watch(name_of(rank), found[rank][1])
        return True

    def _process_ends(self, name: str, code: int) -> None:
        """Give each rank an exit code when mpirun has ended, that of the one to blame first."""
        if name != MPIRUN:
            return
        codes = blamed(self.processes.log(MPIRUN)[self._said :])
        for rank in [*codes, *(rank for rank in range(self.size) if rank not in codes)]:
            self.processes.pids.pop(name_of(rank), None)
            self.processes.codes[name_of(rank)] = codes.get(rank, 128 + signal.SIGTERM)


def blamed(said: str) -> dict[int, int]:
    """Return the rank that mpirun names as the first to end, with its exit code, as a shell does.

    Args:
        said: mpirun's own words.
    """
    by_signal, by_exit = _SIGNAL.search(said), _EXIT.search(said)
    if by_signal:
        return {int(by_signal[1]): 128 + int(by_signal[2])}
    return {int(by_exit[1]): int(by_exit[2])} if by_exit else {}
