"""The engines of live ranks on several hosts, started through ssh as horovodrun starts ranks."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from horovod_lm.host_facts import addresses
from horovod_lm.jupyter.engine_side import CONNECTION, whole_json
from horovod_lm.jupyter.engines import Engines, engine_command, name_of
from horovod_lm.jupyter.processes import GUARDIAN, Processes
from horovod_lm.utils.cluster import FORWARDED, checked_hosts, is_this_machine, ssh_command
from horovod_lm.utils.config import Config, HostConfig
from horovod_lm.utils.errors import DistributedError

# ssh: how soon it takes a host that does not answer any more for lost.
ALIVE = ["-o", "ServerAliveInterval=2", "-o", "ServerAliveCountMax=3", "-o", "LogLevel=ERROR"]
LOST = 255  # ssh: how it ends itself when a connection does


class HostEngines(Engines):
    """Engines on the hosts that a configuration names, as many on each as it has slots.

    Args:
        config: its `distributed` section names the hosts; this one comes first.
        threads: CPU threads of each.

    Raises:
        ConfigError: there are no hosts, or one stands there twice.
        DistributedError: the first host is not this one, or is not on the interface.
    """

    def __init__(self, config: Config, threads: int) -> None:
        self._config, self._hosts = config, checked_hosts(config)
        self._places = [host.name for host in self._hosts for _ in range(host.slots)]
        super().__init__(len(self._places), threads, address_of_this_host(config))

    def revive(self) -> None:
        """Replace engines that are dead or frozen, and wait until all are there.

        Raises:
            DistributedError: one did not come.
        """
        if len(self._tokens) < self.size:  # for the first time
            self._wait(lambda: self._connection() != "", "the controller")
            for there in self._elsewhere.values():
                there.write(CONNECTION, self._connection())
            for rank in range(self._hosts[0].slots, self.size):
                self._start(rank)
        super().revive()

    def host_names(self) -> list[str]:
        """Return the host of each engine."""
        return self._places

    def _make_processes(self) -> Processes:
        here = Processes(self._process_ends)
        self._elsewhere = {
            host.name: ProcessesElsewhere(here, self._config, host, self._threads)
            for host in self._hosts[1:]
        }
        where = {
            name_of(rank): self._elsewhere[place]
            for rank, place in enumerate(self._places)
            if place in self._elsewhere
        }
        return ProcessesOfHosts(here, self._elsewhere, where)

    def _start_all(self) -> None:
        for rank in range(self._hosts[0].slots):
            self._start(rank)

    def _start(self, rank: int) -> None:
        there = self._elsewhere.get(self._places[rank])
        if there is None:
            super()._start(rank)
        else:
            there.start(name_of(rank), engine_command(there.folder, self._new_token(rank)), None)

    def _connection(self) -> str:
        """Return what an engine has to know of the controller; empty while that is not there."""
        return whole_json(self.processes.folder / CONNECTION)


class ProcessesElsewhere(Processes):
    """Named processes of another host; they end with this one, and with the connection.

    Args:
        here: those of this host, which keep the record of all.
        config: how to log in.
        host: which one.
        threads: CPU threads of each.
    """

    def __init__(self, here: Processes, config: Config, host: HostConfig, threads: int) -> None:
        self._on_end, self.last, self.lost = here._on_end, here.last, here.lost
        self.pids, self.codes, self.frozen = here.pids, here.codes, here.frozen
        self._host = host.name
        self.folder = Path(f"{here.folder}-{host.name}")
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        variables = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        variables |= config.distributed.environment | host.environment
        variables |= {"OMP_NUM_THREADS": str(threads)}
        words = ["env", *(f"{name}={value}" for name, value in variables.items())]
        # As `python` stands for on that PATH, where the host has one of its own.
        python = "python" if "PATH" in host.environment else sys.executable
        words += [python, "-m", GUARDIAN, str(self.folder)]
        line = f"cd {shlex.quote(str(config.project_root))} && exec {shlex.join(words)}"
        ssh, *arguments = ssh_command(config, host.name, line)
        self._begin([ssh, *ALIVE, *arguments], self._said)

    def write(self, name: str, text: str) -> None:
        """Write a file in the folder of these processes."""
        self._tell({"write": name, "text": text})

    def log(self, name: str) -> str:
        """Return the last words of a process that ended."""
        return self.last.get(name, "")

    def close(self) -> None:
        """End every process there, and return when the connection is gone."""
        super().close()
        self._said.close()

    def _lose(self, name: str) -> None:
        """The connection has ended, and over there their guardian ends them."""
        self._said.seek(0)
        why = "".join(self._said.read().strip().splitlines()[-1:]) or "it does not answer any more"
        self.lost[name] = self.last[name] = f"its host {self._host} is lost: {why}"
        self.pids.pop(name, None)
        self.codes[name] = LOST


class ProcessesOfHosts(Processes):
    """The processes of all hosts as one.

    Args:
        here: those of this host.
        elsewhere: those of each other host, by its name.
        where: which of them has a process, by the process's name; `here` has the others.
    """

    def __init__(
        self, here: Processes, elsewhere: dict[str, ProcessesElsewhere],
        where: dict[str, ProcessesElsewhere],
    ) -> None:  # fmt: skip
        self._here, self._elsewhere, self._where = here, elsewhere, where
        self.folder, self.last, self.lost = here.folder, here.last, here.lost
        self.pids, self.codes, self.frozen = here.pids, here.codes, here.frozen

    @property
    def parent(self) -> int:
        """The process id of this host's guardian."""
        return self._here.parent

    def start(self, name: str, command: list[str], env: dict[str, str] | None) -> None:
        """Start a process on its host."""
        self._on(name).start(name, command, env)

    def kill(self, name: str) -> None:
        """Kill a process and what it has started."""
        self._on(name).kill(name)

    def interrupt(self, name: str) -> None:
        """Do to a process what Ctrl-C does."""
        self._on(name).interrupt(name)

    def log(self, name: str) -> str:
        """Return what a process wrote past its own streams; of another host's, its last words."""
        return self._on(name).log(name)

    def close(self) -> None:
        """End every process of every host."""
        for processes in [*self._elsewhere.values(), self._here]:
            processes.close()

    def _on(self, name: str) -> Processes:
        return self._where.get(name, self._here)


def address_of_this_host(config: Config) -> str:
    """Return this host's address as the others reach it.

    Raises:
        DistributedError: it is not the first host, or has no address on the interface.
    """
    first, wanted = checked_hosts(config)[0].name, config.distributed.interface
    if not is_this_machine(first):
        raise DistributedError(
            f"{first} is not this machine: distributed.hosts begins with the host of the notebook"
        )
    interfaces = addresses()
    if wanted and wanted not in interfaces:
        raise DistributedError(
            f"{first} has no address on the interface {wanted}: set distributed.interface to one"
            f" of {', '.join(sorted(interfaces))}"
        )
    own = [one for one in interfaces.values() if not one.startswith("127.")]
    return interfaces[wanted] if wanted else next(iter(own), "127.0.0.1")
