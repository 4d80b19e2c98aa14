"""Live Horovod ranks for experiments in a notebook, one collective at a time.

    from horovod_lm.jupyter.live.cluster import HorovodCluster

    cluster = HorovodCluster(n=2).start()

    %%px
    hvd.allreduce(torch.ones(1) * hvd.rank(), name="first")

Each rank is a process on this host that keeps its variables from cell to cell. When a rank fails,
no other waits for it; `cluster.restart_ranks()` starts Horovod again and keeps the variables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
from IPython import get_ipython

from horovod_lm.jupyter.live.rank_processes import LiveRank, Task
from horovod_lm.jupyter.run_cell.horovodrun_job import require_horovod, threads_per_rank
from horovod_lm.jupyter.run_cell.job_result import RankError, RanksStopped, rank_list
from horovod_lm.utils.errors import ConfigError, DistributedError
from horovod_lm.utils.machine import available_cores

if TYPE_CHECKING:
    from horovod_lm.jupyter.live.rendezvous import Rendezvous

RESTART = "cluster.restart_ranks() starts the ranks again"
NOT_RUNNING = "the cluster is not running: cluster.start() starts it"


class HorovodCluster:
    """N live ranks over Gloo. Use it in a `with` statement, or call `start` and `stop`.

    Args:
        n: the number of ranks.
        threads: CPU threads of each; None: an equal share of the cores.
        stall: seconds after which ranks that wait for one another are freed; 0: never.
        process_sets: whether `hvd.add_process_set` may form groups of ranks. Idle ranks then use
            about twice as much of a core as otherwise, which is little.

    Raises:
        ConfigError: `n` is less than 1.
    """

    current: HorovodCluster | None = None  # the one that `%%px` uses

    def __init__(
        self, n: int = 2, *, threads: int | None = None, stall: int = 6, process_sets: bool = False
    ) -> None:
        if n < 1:
            raise ConfigError(f"HorovodCluster(n={n}): there must be at least one rank")
        self.n, self.threads, self.stall, self.process_sets = n, threads, stall, process_sets
        self._ranks: list[LiveRank] = []  # empty: not running
        self._rendezvous: Rendezvous | None = None
        self._broken = ""

    # ---- from start to stop ---------------------------------------------------------------------

    def start(self) -> HorovodCluster:
        """Start the ranks, give the notebook its `%%px`, and return this cluster.

        A cluster that was started before is stopped, so that a cell can be run twice.

        Raises:
            DistributedError: Horovod is not installed, or a rank did not start.
        """
        if self._ranks:
            return self
        require_horovod()
        if HorovodCluster.current is not None:
            HorovodCluster.current.stop()
        try:
            self._ranks = [self._new_rank(number) for number in range(self.n)]
            self._start_horovod(new=self._ranks)
        except BaseException:
            self.stop()
            raise
        HorovodCluster.current = self
        shell = get_ipython()
        if shell is not None:
            shell.extension_manager.load_extension("horovod_lm.jupyter")
        return self

    def stop(self) -> None:
        """End the ranks. May be called twice."""
        for rank in self._ranks:
            rank.process.stop()
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
        if HorovodCluster.current is self:
            HorovodCluster.current = None

    def __enter__(self) -> HorovodCluster:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def restart_ranks(self, env: Mapping[str, str] | None = None) -> None:
        """Start Horovod again on every rank; processes that died are replaced.

        Args:
            env: Horovod's settings, which it reads when it starts, such as
                {"HOROVOD_CYCLE_TIME": "5"}. A rank that was once given a fusion threshold keeps it
                until it is given another one.

        Raises:
            DistributedError: a rank did not start.
        """
        if not self._ranks:
            raise DistributedError(NOT_RUNNING)
        new = [self._new_rank(rank.number) for rank in self._ranks if rank.has_ended]
        for rank in new:
            self._ranks[rank.number].close()
            self._ranks[rank.number] = rank
        self._start_horovod(new, env)

    def _new_rank(self, number: int) -> LiveRank:
        return LiveRank(number, self.threads or max(1, available_cores() // self.n))

    def _start_horovod(self, new: Sequence[LiveRank], env: Mapping[str, str] | None = None) -> None:
        from horovod_lm.jupyter.live.rendezvous import Rendezvous  # needs Horovod

        for rank in new:
            rank.wait_until_ready()
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._rendezvous = Rendezvous(self.n, self.stall)
        threads = threads_per_rank(self.n, self.threads)
        groups = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if self.process_sets else {}
        arguments = [
            ({**(env or {}), **settings, **groups}, threads)
            for settings in self._rendezvous.settings
        ]
        error = Task(self._ranks, "start", arguments).wait()
        self._broken = "" if error is None else str(error)
        if error is not None:
            raise DistributedError(f"the ranks did not start: {error}; {RESTART}")

    # ---- work -----------------------------------------------------------------------------------

    def run(self, work: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run code, or call a function, on every rank; show what they print, rank by rank.

        Args:
            work: Python code, or a function for `args` and `kwargs`.

        Returns:
            Each rank's last or returned value, in the order of ranks.

        Raises:
            RankError: a rank failed; the text names it, and the ranks have to be started again.
            RanksStopped: the notebook was interrupted.
        """
        if isinstance(work, str):
            return self._perform("cell", work, True)
        return self._perform("function", cloudpickle.dumps((work, args, kwargs)))

    def run_cell(self, source: str) -> None:
        """Run a cell as `%%px` does: its last value is shown, not returned."""
        self._perform("cell", source, False)

    def push(self, **values: Any) -> None:
        """Set variables of every rank."""
        self.run(_update, values)

    def __repr__(self) -> str:
        state = (self._broken or "ready") if self._ranks else "not running"
        return f"<HorovodCluster of {rank_list(list(range(self.n)))}: {state}>"

    def _perform(self, operation: str, *arguments: Any) -> list[Any]:
        if not self._ranks:
            raise DistributedError(NOT_RUNNING)
        if self._broken:
            raise DistributedError(f"the ranks have ended ({self._broken}); {RESTART}")
        task = Task(self._ranks, operation, [arguments] * self.n)
        error = task.wait()
        task.show()
        if error is not None:
            self._broken = str(error)
            text = f"{error}; {RESTART}"
            if isinstance(error, RanksStopped):
                raise RanksStopped(text)
            raise RankError(text, error.rank, error.code, error.trace)
        return task.values()


def _update(values: dict[str, Any]) -> None:
    vars(sys.modules["__main__"]).update(values)  # of the rank's process
