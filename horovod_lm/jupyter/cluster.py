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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cloudpickle
import ipyparallel
import psutil
from IPython.core.profiledir import ProfileDir

from horovod_lm.jupyter import engine_side
from horovod_lm.jupyter.call import inherited, share_the_cores
from horovod_lm.jupyter.outcome import RankError, RanksStopped, how, ranks
from horovod_lm.jupyter.processes import Processes
from horovod_lm.jupyter.tasks import Task, Tasks
from horovod_lm.utils.errors import ConfigError, DistributedError

SECONDS_TO_START = 60.0
SECONDS_GLOO_WAITS = 6  # Horovod: for a rank whose host does not answer any more
AGAIN = "cluster.restart_ranks() starts the ranks again"
NOTE = "note: the ranks share this machine's cores evenly; HorovodCluster(threads=N) gives each N"


class HorovodCluster:
    """N live ranks over Gloo. Use it in a `with`, or call `start` and `stop`.

    Args:
        n: how many ranks.
        threads: CPU threads of each; None: a fair share of the cores.
        stall: seconds after which ranks that wait for one another are freed; 0: never.
        client: an `ipyparallel.Client` whose engines, on any hosts, become the ranks. They are not
            ended with this cluster, and `n` is how many there are.
        interface: the network interface that the hosts share, for example "eth0".
        address: this host's address as the others reach it; needed where they are other hosts.

    Raises:
        ConfigError: a number makes no sense.
    """

    _said = False
    current: HorovodCluster | None = None  # the one that `%%px` means

    def __init__(
        self, n: int = 2, *, threads: int | None = None, stall: int = 6,
        client: ipyparallel.Client | None = None, interface: str = "", address: str = "",
    ) -> None:  # fmt: skip
        if n < 1:
            raise ConfigError(f"HorovodCluster(n={n}): there must be at least one rank")
        self.n = len(client.ids) if client is not None else n
        self.threads, self.stall = threads, stall
        self._own, self._client = client is None, client
        self._interface, self._address = interface, address
        self._processes: Processes | None = None
        self._engines: list[int] = []  # ipyparallel's numbers, by rank
        self._rendezvous: Any = None
        self._broken = ""

    # ---- from start to stop ---------------------------------------------------------------------

    def start(self) -> HorovodCluster:
        """Start engines and ranks, give the notebook its `%%px`, and return this cluster.

        Raises:
            DistributedError: an engine or a rank did not come.
        """
        if self._engines:
            return self
        try:
            if self._own:
                self._start_processes()
            self.restart_ranks()
        except BaseException:
            self.stop()
            raise
        self._register_magic()
        return self

    def stop(self) -> None:
        """End the ranks, and every process that this cluster has started. May be called twice."""
        if not self._own and self._engines:
            self._client[self._engines].apply_async(engine_side.end_rank)
        if self._own and self._client is not None:
            self._client.close()
            self._client = None
        if self._processes is not None:
            self._processes.close()
            self._processes = None
        self._stop_rendezvous()
        self._engines = []
        if HorovodCluster.current is self:
            HorovodCluster.current = None

    def __enter__(self) -> HorovodCluster:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def restart_ranks(self) -> None:
        """Start the ranks again on their engines; engines that died are replaced.

        Raises:
            DistributedError: an engine or a rank did not come.
        """
        if self._own:
            self._need_processes()
            self._free_the_busy()
            self._find_engines()
        else:
            self._engines = list(self._client.ids)
        self._start_ranks()
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
        if self._processes is not None:
            for rank in range(self.n):
                self._processes.interrupt(_name(rank))
        else:
            self._client.send_signal(2, targets=self._engines, block=False)

    def __repr__(self) -> str:
        state = "not started" if not self._engines else self._broken or "ready"
        return f"<HorovodCluster of {ranks(list(range(self.n)))}: {state}>"

    def _perform(self, call: partial, only: Sequence[int] | None) -> list[Any]:
        chosen = list(range(self.n)) if only is None else list(only)
        self._check(chosen)
        tasks = self._tasks({rank: self._send(rank, call) for rank in chosen})
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
        if not self._engines:
            raise DistributedError("the cluster is not running: cluster.start() starts it")
        wrong = [rank for rank in only if not 0 <= rank < self.n]
        if wrong:
            raise ConfigError(f"there is no rank {wrong[0]}: the ranks are 0 to {self.n - 1}")
        if self._broken:
            raise DistributedError(f"the ranks have ended ({self._broken}); {AGAIN}")

    def _send(self, rank: int, call: partial) -> Task:
        view = self._client[self._engines[rank]]
        return Task(rank, view.apply_async(call.func, *call.args), _name(rank))

    def _tasks(self, sent: dict[int, Task]) -> Tasks:
        return Tasks(sent, self.n, self._processes)

    # ---- processes and engines ------------------------------------------------------------------

    def _start_processes(self) -> None:
        self._processes = Processes()
        # Both sides would make the folders of a profile at the same time.
        ProfileDir.create_profile_dir(str(self._processes.folder))
        command = [
            sys.executable, "-m", "ipyparallel.controller", f"--profile-dir={self._profile}",
            "--usethreads", "--nodb", "--ping=1000", "--ip=127.0.0.1",
            "--log-level=ERROR",
        ]  # fmt: skip
        for rank in range(self.n):
            self._start_engine(rank)
        self._processes.start("controller", command, inherited())

    @property
    def _profile(self) -> str:
        return str(self._processes.folder)

    def _start_engine(self, rank: int) -> None:
        command = [
            sys.executable, "-m", "horovod_lm.jupyter.engine_side", str(self._processes.parent),
            f"--profile-dir={self._profile}", "--IPEngine.wait_for_url_file=60",
            "--IPEngine.enable_nanny=False", "--IPEngine.timeout=30",
            "--log-level=ERROR",
        ]  # fmt: skip
        env = {**inherited(), "OMP_NUM_THREADS": str(self._threads_quietly()),
               "PYTHONPATH": ":".join(path for path in sys.path if path)}  # fmt: skip
        self._processes.start(_name(rank), command, env)

    def _threads_quietly(self) -> int:
        from horovod_lm.utils.cores import available_cores

        return self.threads or max(1, available_cores() // self.n)

    def _need_processes(self) -> None:
        if self._processes is None:
            raise DistributedError("the cluster is not running: cluster.start() starts it")

    def _free_the_busy(self) -> None:
        """Replace engines that do not answer: frozen, dead, or busy with what cannot be freed."""
        for rank in range(self.n):
            name = _name(rank)
            if name in self._processes.frozen:
                self._processes.kill(name)
                self._wait(lambda name=name: name in self._processes.codes, f"{name}'s end")
            if name in self._processes.codes:
                self._start_engine(rank)
                self._wait(lambda name=name: name in self._processes.pids, name)

    def _find_engines(self) -> None:
        """Wait until every process has come as an engine, and note which engine is which rank."""
        connection = self._processes.folder / "security" / "ipcontroller-client.json"
        if self._client is None:
            self._wait(connection.exists, "the controller")
            self._client = ipyparallel.Client(str(connection), timeout=SECONDS_TO_START)
        by_pid: dict[int, int] = {}

        def all_came() -> bool:
            for engine in [one for one in self._client.ids if one not in by_pid.values()]:
                try:
                    pid = self._client[engine].apply_async(engine_side.process_id).get(30)
                except ipyparallel.RemoteError:  # it has died, and ipyparallel has not yet seen it
                    continue
                by_pid[pid] = engine
            return all(self._processes.pids.get(_name(rank)) in by_pid for rank in range(self.n))

        self._wait(all_came, "an engine")
        self._engines = [by_pid[self._processes.pids[_name(rank)]] for rank in range(self.n)]

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not condition():
            for name, code in self._processes.codes.items():
                if what != f"{name}'s end":
                    last = self._processes.log(name).strip().splitlines()[-1:]
                    raise DistributedError(
                        f"{name} {how(code)} before it was ready: {''.join(last)}"
                    )
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"{what} did not come within {SECONDS_TO_START:g} s: call cluster.stop() and"
                    " cluster.start() when the machine has less to do"
                )
            time.sleep(0.02)

    # ---- ranks ----------------------------------------------------------------------------------

    def _start_ranks(self) -> None:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.gloo_run import create_slot_env_vars

        names = self._host_names()
        if self.threads is None and self.n > 1 and not HorovodCluster._said:
            HorovodCluster._said = True
            print(NOTE, file=sys.stderr)
        threads = share_the_cores(max(Counter(names).values()), self.threads)
        self._engines = [engine for name in dict.fromkeys(names)
                         for engine, own in zip(self._engines, names, strict=True) if own == name]  # fmt: skip
        slots = ",".join(f"{name}:{count}" for name, count in Counter(names).items())
        plan = get_host_assignments(parse_hosts(slots), self.n)
        env = self._settings(plan)
        sent = {
            slot.rank: self._send(
                slot.rank, partial(engine_side.start_rank, {**env, **create_slot_env_vars(slot)}, threads)
            )
            for slot in plan
        }  # fmt: skip
        error = self._tasks(sent).wait(self.interrupt)
        if error is not None:
            self._broken = str(error)
            raise DistributedError(f"the ranks did not start: {error}; {AGAIN}")

    def _host_names(self) -> list[str]:
        if self._own:
            return ["localhost"] * self.n
        return [
            self._client[one].apply_async(engine_side.hostname).get(30) for one in self._engines
        ]

    def _settings(self, plan: list) -> dict[str, str]:
        """Return Horovod's variables for a new generation of ranks, with a rendezvous of its own."""
        from horovod.runner.http.http_server import RendezvousServer

        self._stop_rendezvous()
        self._rendezvous = RendezvousServer(0)
        # Horovod: it listens on every interface; ranks of this host need the loopback only.
        port = self._rendezvous.start()
        self._rendezvous.init(plan)
        env = {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": self._address or "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(SECONDS_GLOO_WAITS),
            "HOROVOD_STALL_CHECK_TIME_SECONDS": str(max(1, self.stall // 3)),
            "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(self.stall),
        }
        interface = self._interface or (_loopback() if self._own else "")
        return {**env, "HOROVOD_GLOO_IFACE": interface} if interface else env

    def _stop_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.stop()
            self._rendezvous._httpd.server_close()  # Horovod: it leaves its port open
            self._rendezvous = None

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


def _name(rank: int) -> str:
    return f"rank {rank}"


def _loopback() -> str:
    """Return the name of the interface that only this host reaches."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return ""
