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
import threading
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle
from IPython import get_ipython

from horovod_lm.jupyter.live.rank_processes import LiveRank, perform, show
from horovod_lm.jupyter.run_cell.horovodrun_job import (
    require_horovod,
    stall_settings,
    threads_per_rank,
)
from horovod_lm.jupyter.run_cell.job_result import RankError, RanksStopped, rank_list
from horovod_lm.launch.elastic_hosts import LOOPBACK, loopback_interface
from horovod_lm.utils.errors import ConfigError, DistributedError

GLOO_TIMEOUT_SECONDS = 6  # how long Gloo waits for a rank that does not answer
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
        self._ranks: dict[int, LiveRank] = {}  # by rank; empty: not running
        self._rendezvous: Any = None  # the server through which the ranks find each other
        self._broken = ""

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
            self._start_ranks()
        except BaseException:
            self.stop()
            raise
        HorovodCluster.current = self
        if shell := get_ipython():
            shell.extension_manager.load_extension("horovod_lm.jupyter")
        return self

    def stop(self) -> None:
        """End the ranks. May be called twice."""
        for rank in self._ranks.values():
            rank.process.stop()
        for rank in self._ranks.values():
            rank.close()
        self._ranks = {}
        self._close_rendezvous()
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
        self._start_ranks(env)

    def _start_ranks(self, env: Mapping[str, str] | None = None) -> None:
        """Start the processes that do not run, and Horovod on every rank."""
        threads = threads_per_rank(self.n, self.threads)
        new = [n for n in range(self.n) if n not in self._ranks or self._ranks[n].has_ended]
        for number in new:
            if number in self._ranks:
                self._ranks[number].close()
            self._ranks[number] = LiveRank(number, threads)
        for number in new:
            self._ranks[number].wait_until_ready()
        groups = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if self.process_sets else {}
        settings = self._open_rendezvous()
        arguments = [({**(env or {}), **own, **groups}, threads) for own in settings]
        error = perform(list(self._ranks.values()), "start", arguments).error()
        self._broken = str(error or "")
        if error:
            raise DistributedError(f"the ranks did not start: {error}; {RESTART}")

    def _open_rendezvous(self) -> list[dict[str, str]]:
        """Start the server that each start of Horovod needs anew; return each rank's settings."""
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.gloo_run import create_slot_env_vars
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

        self._close_rendezvous()
        slots = get_host_assignments(parse_hosts(f"localhost:{self.n}"), self.n)
        # Not Horovod's RendezvousServer, which listens on every interface: whoever can connect can
        # join.
        self._rendezvous = RendezvousHTTPServer((LOOPBACK, 0), RendezvousHandler, 0)
        self._rendezvous.init(slots)
        threading.Thread(target=self._rendezvous.serve_forever, daemon=True).start()
        common = {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": LOOPBACK,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(self._rendezvous.server_address[1]),
            "HOROVOD_GLOO_IFACE": loopback_interface(),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            **stall_settings(self.stall, GLOO_TIMEOUT_SECONDS, longest_period=2),
        }
        return [{**common, **create_slot_env_vars(slot)} for slot in slots]

    def _close_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.shutdown()
            self._rendezvous.server_close()
            self._rendezvous = None

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
        result = perform(list(self._ranks.values()), operation, [arguments] * self.n)
        show(result)
        if error := result.error():
            self._broken = str(error)
            text = f"{error}; {RESTART}"
            if isinstance(error, RanksStopped):
                raise RanksStopped(text)
            raise RankError(text, error.rank, error.code, error.trace)
        return result.load_values()


def _update(values: dict[str, Any]) -> None:
    vars(sys.modules["__main__"]).update(values)  # of the rank's process
