"""Live Horovod ranks for experiments in a notebook, one collective at a time.

    from horovod_lm.jupyter.live.cluster import HorovodCluster

    cluster = HorovodCluster(n=2).start()

    %%px
    hvd.allreduce(torch.ones(1) * hvd.rank(), name="first")

Each rank is an ipyparallel engine on this host: what a cell defines there is there for the next
one. When a rank fails, no other waits for it; `cluster.restart_ranks()` starts them again, with
what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
from IPython import get_ipython

from horovod_lm.jupyter.live import engine_side
from horovod_lm.jupyter.live.engines import Engines
from horovod_lm.jupyter.live.tasks import Tasks
from horovod_lm.jupyter.run_cell.job import require_horovod, threads_per_rank
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
        process_sets: whether `hvd.add_process_set` may form groups of ranks. Ranks that wait for
            work then take about twice as much of a core as otherwise, which is little.

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
        self._engines: Engines | None = None
        self._rendezvous: Rendezvous | None = None
        self._broken = ""

    # ---- from start to stop ---------------------------------------------------------------------

    def start(self) -> HorovodCluster:
        """Start engines and ranks, give the notebook its `%%px`, and return this cluster.

        Raises:
            DistributedError: Horovod is not installed, or an engine or a rank did not start.
        """
        if self._engines is not None:
            return self
        require_horovod()
        try:
            self._engines = Engines(self.n, self.threads or max(1, available_cores() // self.n))
            self.restart_ranks()
        except BaseException:
            self.stop()
            raise
        HorovodCluster.current = self
        shell = get_ipython()
        if shell is not None:
            shell.extension_manager.load_extension("horovod_lm.jupyter")
        return self

    def stop(self) -> None:
        """End the ranks and their engines. May be called twice."""
        if self._engines is not None:
            self._engines.close()
            self._engines = None
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
        """Start the ranks again on their engines; engines that died are replaced.

        Args:
            env: Horovod's settings for them, which it reads when it starts, such as
                {"HOROVOD_CYCLE_TIME": "5"}. An engine that was once given a fusion threshold keeps
                it until it is given another one.

        Raises:
            DistributedError: an engine or a rank did not start.
        """
        from horovod_lm.jupyter.live.rendezvous import Rendezvous  # needs Horovod

        if self._engines is None:
            raise DistributedError(NOT_RUNNING)
        self._engines.revive()
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._rendezvous = Rendezvous(self.n, self.stall)
        threads = threads_per_rank(self.n, self.threads, "HorovodCluster(threads=N)")
        groups = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if self.process_sets else {}
        sent = {
            rank: self._engines.send(
                rank,
                partial(engine_side.start_rank, {**(env or {}), **settings, **groups}, threads),
            )
            for rank, settings in enumerate(self._rendezvous.settings)
        }
        error = Tasks(self._engines, sent).wait()
        self._broken = "" if error is None else str(error)
        if error is not None:
            raise DistributedError(f"the ranks did not start: {error}; {RESTART}")

    # ---- work -----------------------------------------------------------------------------------

    def run(
        self, work: str | Callable[..., Any], *args: Any, only: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> list[Any]:  # fmt: skip
        """Run code, or call a function, on every rank; show what they print, rank by rank.

        Args:
            work: Python as in a cell, or a function for `args` and `kwargs`.
            only: ranks that run it, where not all do.

        Returns:
            Each rank's last or returned value, in the order of ranks.

        Raises:
            RankError: a rank failed; the text names it, and the ranks have to be started again.
            RanksStopped: the notebook was interrupted.
        """
        if isinstance(work, str):
            task = partial(engine_side.run_cell, work, True)
        else:
            task = partial(engine_side.run_function, cloudpickle.dumps((work, args, kwargs)))
        return self._perform(task, only)

    def run_cell(self, source: str, only: Sequence[int] | None = None) -> None:
        """Run a cell as `%%px` does: its last value is shown, not returned."""
        self._perform(partial(engine_side.run_cell, source, False), only)

    def rank(self, number: int) -> Rank:
        """Return a handle of one rank.

        Raises:
            ConfigError: there is no such rank.
        """
        self._check(only=[number])
        return Rank(self, number)

    def __repr__(self) -> str:
        state = "not running" if self._engines is None else self._broken or "ready"
        return f"<HorovodCluster of {rank_list(list(range(self.n)))}: {state}>"

    def _perform(self, call: partial, only: Sequence[int] | None) -> list[Any]:
        chosen = list(range(self.n)) if only is None else list(only)
        engines = self._check(chosen)
        sent = {} if engines.ended() else {rank: engines.send(rank, call) for rank in chosen}
        tasks = Tasks(engines, sent)
        error = tasks.wait()
        tasks.show()
        if error is not None:
            self._broken = str(error)
            text = f"{error}; {RESTART}"
            if isinstance(error, RanksStopped):
                raise RanksStopped(text)
            raise RankError(text, error.rank, error.code, error.trace)
        return tasks.values()

    def _check(self, only: Sequence[int]) -> Engines:
        if self._engines is None:
            raise DistributedError(NOT_RUNNING)
        wrong = [rank for rank in only if not 0 <= rank < self.n]
        if wrong:
            raise ConfigError(f"there is no rank {wrong[0]}: the ranks are 0 to {self.n - 1}")
        if self._broken:
            raise DistributedError(f"the ranks have ended ({self._broken}); {RESTART}")
        return self._engines


class Rank:
    """One rank of a cluster."""

    def __init__(self, cluster: HorovodCluster, number: int) -> None:
        self.cluster, self.number = cluster, number

    def run(self, work: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run code, or call a function, on this rank alone, and return its value."""
        return self.cluster.run(work, *args, only=[self.number], **kwargs)[0]

    def push(self, **values: Any) -> None:
        """Give the rank values under these names."""
        self.run(_update, values)


def _update(values: dict[str, Any]) -> None:
    engine_side.user_namespace().update(values)
