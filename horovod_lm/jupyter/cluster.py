"""Live Horovod ranks that a notebook pokes at, one collective at a time.

    from horovod_lm.jupyter.cluster import HorovodCluster

    cluster = HorovodCluster(n=2).start()

    %%px
    hvd.allreduce(torch.ones(1) * hvd.rank(), name="first")

Each rank is an ipyparallel engine: what a cell defines there is there for the next one. When a rank
fails, no other waits for it; `cluster.restart_ranks()` starts them again, with what they hold.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import ipyparallel

from horovod_lm.jupyter import engine_side
from horovod_lm.jupyter.call import share_the_cores
from horovod_lm.jupyter.engines import ClientsEngines, Engines
from horovod_lm.jupyter.outcome import RankError, RanksStopped, ranks
from horovod_lm.jupyter.tasks import Tasks
from horovod_lm.utils.cli import command
from horovod_lm.utils.cluster import checked_hosts
from horovod_lm.utils.config import Config, load_config
from horovod_lm.utils.errors import ConfigError, DistributedError
from horovod_lm.utils.machine import available_cores

AGAIN = "cluster.restart_ranks() starts the ranks again"
LOOPBACK = "127.0.0.1"
NOT_RUNNING = "the cluster is not running: cluster.start() starts it"
NOTE = "note: the ranks share this machine's cores evenly; HorovodCluster(threads=N) gives each N"


class HorovodCluster:
    """N live ranks over Gloo. Use it in a `with`, or call `start` and `stop`.

    Args:
        n: how many ranks.
        threads: CPU threads of each; None: a fair share of the cores.
        stall: seconds after which ranks that wait for one another are freed; 0: never.
        hosts: a configuration, or its file, whose `distributed` section names the hosts, this one
            first: each slot becomes a rank.
        client: an `ipyparallel.Client` whose engines, on any hosts, become the ranks. They are not
            ended with this cluster, and `n` is how many there are.
        interface: of a client's hosts: the network interface that they share, such as "eth0".
        address: of a client's hosts: where they reach this one.
        controller: what the ranks talk over: "gloo", or "mpi" where Horovod was built with it. MPI
            ends all ranks when it loses one, and they start again empty, on this host only.
        process_sets: whether `hvd.add_process_set` may form groups of ranks. Ranks that wait for
            work then take about twice as much of a core as otherwise, which is little.

    Raises:
        ConfigError: a number makes no sense.
    """

    _said = False
    current: HorovodCluster | None = None  # the one that `%%px` means

    def __init__(
        self, n: int = 2, *, threads: int | None = None, stall: int = 6,
        hosts: Config | str | Path | None = None, client: ipyparallel.Client | None = None,
        interface: str = "", address: str = LOOPBACK, controller: str = "gloo",
        process_sets: bool = False,
    ) -> None:  # fmt: skip
        if n < 1:
            raise ConfigError(f"HorovodCluster(n={n}): there must be at least one rank")
        if client is not None and not client.ids:
            raise ConfigError("HorovodCluster(client=...): no engine has come to this client")
        if controller not in ("gloo", "mpi"):
            raise ConfigError(f'controller={controller!r}: it is "gloo" or "mpi"')
        if controller == "mpi" and (client, hosts) != (None, None):
            raise ConfigError(
                'controller="mpi" starts its own engines on this host: leave hosts and client out'
            )
        self._hosts = load_config(hosts) if isinstance(hosts, str | Path) else hosts
        self.n = n if client is None else len(client.ids)
        if self._hosts is not None:
            self.n = sum(host.slots for host in checked_hosts(self._hosts))
            interface = self._hosts.distributed.interface or ""
        self.threads, self.stall = threads, stall
        self._client, self._interface, self._address = client, interface, address
        self._controller, self.process_sets = controller, process_sets
        self._engines: Engines | ClientsEngines | None = None
        self._rendezvous: Any = None
        self._broken = ""

    # ---- from start to stop ---------------------------------------------------------------------

    def start(self) -> HorovodCluster:
        """Start engines and ranks, give the notebook its `%%px`, and return this cluster.

        Raises:
            DistributedError: Horovod is not installed, or an engine or a rank did not come.
        """
        if self._engines is not None:
            return self
        _rendezvous()
        try:
            self._engines = self._make_engines()
            self.restart_ranks()
        except BaseException:
            self.stop()
            raise
        self._register_magic()
        return self

    def _make_engines(self) -> Engines | ClientsEngines:
        if self._client is not None:
            return ClientsEngines(self._client)
        threads = self.threads or max(1, available_cores() // self.n)
        if self._hosts is not None:
            from horovod_lm.jupyter.host_engines import HostEngines, address_of_this_host

            self._address = address_of_this_host(self._hosts)
            return HostEngines(self._hosts, threads)
        if self._controller == "gloo":
            return Engines(self.n, threads)
        from horovod_lm.jupyter.mpi_engines import MpiEngines

        return MpiEngines(self.n, threads)

    def stop(self) -> None:
        """End the ranks, and every process that this cluster has started. May be called twice."""
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
            DistributedError: an engine or a rank did not come.
        """
        if self._engines is None:
            raise DistributedError(NOT_RUNNING)
        self._engines.revive()
        self._start_ranks(env or {})
        self._broken = ""

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

    apply = run

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

    def interrupt(self) -> None:
        """Interrupt all ranks: one alone would leave the others waiting."""
        if self._engines is None:
            raise DistributedError(NOT_RUNNING)
        self._engines.interrupt()

    def __repr__(self) -> str:
        state = "not running" if self._engines is None else self._broken or "ready"
        return f"<HorovodCluster of {ranks(list(range(self.n)))}: {state}>"

    def _perform(self, call: partial, only: Sequence[int] | None) -> list[Any]:
        chosen = list(range(self.n)) if only is None else list(only)
        self._check(chosen)
        missing = self._engines.missing()
        sent = {} if missing else {rank: self._engines.send(rank, call) for rank in chosen}
        tasks = Tasks(sent, self.n, self._engines.processes, missing)
        error = tasks.wait(self.interrupt)
        tasks.show()
        if error is not None:
            self._broken = str(error)
            text = f"{error}; {AGAIN}"
            if isinstance(error, RanksStopped):
                raise RanksStopped(text)
            raise RankError(text, error.rank, error.code, error.trace)
        return tasks.values()

    def _check(self, only: Sequence[int]) -> None:
        if self._engines is None:
            raise DistributedError(NOT_RUNNING)
        wrong = [rank for rank in only if not 0 <= rank < self.n]
        if wrong:
            raise ConfigError(f"there is no rank {wrong[0]}: the ranks are 0 to {self.n - 1}")
        if self._broken:
            raise DistributedError(f"the ranks have ended ({self._broken}); {AGAIN}")

    # ---- ranks ----------------------------------------------------------------------------------

    def _start_ranks(self, env: Mapping[str, str]) -> None:
        names = self._engines.host_names()
        if self.threads is None and self.n > 1:
            self._say_once()
        threads = share_the_cores(max(Counter(names).values()), self.threads)
        groups = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if self.process_sets else {}
        sent = {
            rank: self._engines.send(
                rank, partial(engine_side.start_rank, {**env, **settings, **groups}, threads)
            )
            for rank, settings in enumerate(self._settings(names))
        }
        error = Tasks(sent, self.n, self._engines.processes).wait(self.interrupt)
        if error is not None:
            self._broken = str(error)
            raise DistributedError(f"the ranks did not start: {error}; {AGAIN}")

    def _settings(self, host_names: Sequence[str]) -> list[dict[str, str]]:
        """Return Horovod's environment variables by rank, and put the engines into that order."""
        if self._controller == "mpi":
            from horovod_lm.jupyter.mpi_engines import SETTINGS
            from horovod_lm.jupyter.rendezvous import stall_settings

            return [{**SETTINGS, **stall_settings(self.stall)}] * self.n
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._rendezvous = _rendezvous()(host_names, self._address, self.stall, self._interface)
        self._engines.ids = [self._engines.ids[place] for place in self._rendezvous.order]
        return self._rendezvous.settings

    def _say_once(self) -> None:
        if not HorovodCluster._said:
            HorovodCluster._said = True
            print(NOTE, file=sys.stderr)

    def _register_magic(self) -> None:
        HorovodCluster.current = self
        from IPython import get_ipython

        if get_ipython() is not None:
            from horovod_lm.jupyter.px import register

            register(get_ipython())


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

    def pull(self, name: str) -> Any:
        """Return the value of a name, or of any expression."""
        return self.run(name)

    def __repr__(self) -> str:
        return f"<rank {self.number} of {self.cluster.n}>"


def _update(values: dict[str, Any]) -> None:
    engine_side.user_namespace().update(values)


def _rendezvous() -> type:
    """Return the class, which needs Horovod.

    Raises:
        DistributedError: Horovod is not installed.
    """
    try:
        from horovod_lm.jupyter.rendezvous import Rendezvous
    except ModuleNotFoundError:
        raise DistributedError(
            f"Horovod is not installed: run {command('horovod_lm.install_horovod')}"
        ) from None
    return Rendezvous
