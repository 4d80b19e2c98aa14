"""One call of horovodrun, as a notebook makes it: hosts, environment, threads, and the cell."""

from __future__ import annotations

import argparse
import base64
import os
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from horovod_lm.jupyter import rank_cell
from horovod_lm.jupyter.supervisor import Job
from horovod_lm.utils.cli import command
from horovod_lm.utils.discovery import elastic_command, loopback_name, write_hosts
from horovod_lm.utils.errors import ConfigError, DistributedError
from horovod_lm.utils.machine import available_cores

COMMANDS_PATIENCE = 8.0  # seconds that a command has to save and end when it is asked to
# Linux's limit for one argument is 128 KiB, and a rank's whole call is one argument.
LARGEST_INLINE = 64 * 1024
_HOST = re.compile(r"^(\S+)\s+slots\s*=\s*(\d+)$")
_LOCAL = {"localhost", "127.0.0.1"}
# What a kernel has in its environment for itself, and what would make ranks of ranks.
_NOT_PASSED_ON = re.compile(
    r"^(HOROVOD_(RANK|SIZE|LOCAL_.*|CROSS_.*|HOSTNAME|GLOO_RENDEZVOUS.*)|MPLBACKEND|JPY_.*|PYDEVD_.*)$"
)


@dataclass
class Call:
    """What is run, where, and how.

    Attributes:
        size: how many ranks.
        hosts: slots by host, in order; None: this one alone.
        launcher: horovodrun and its options.
        command: what each rank runs.
        env: environment variables of every rank, on top of the kernel's.
        what: the name of it in sentences.
        elastic: whether ranks may come and go.
        cell: the packed cell, where one is run.
        timeout: seconds; 0: without end.
        patience: seconds that ranks have to end by themselves.
        log_dir: where the ranks' output is kept, if anywhere.
        cwd: the folder that it is started in.
    """

    size: int
    hosts: dict[str, int] | None
    launcher: list[str]
    command: list[str]
    env: dict[str, str]
    what: str = "the cell"
    elastic: bool = False
    cell: bytes = b""
    timeout: float = 0.0
    patience: float = 2.0
    log_dir: str = ""
    cwd: str = field(default_factory=os.getcwd)

    @classmethod
    def of_command(cls, arguments: argparse.Namespace, command: Sequence[str]) -> Call:
        """Return the call that runs a command, with the options that a magic's line gives."""
        program = list(command)
        if program[0] in ("python", "python3"):
            program[0] = sys.executable  # the kernel's, whatever the PATH says
        name = " ".join(program[1:3]) if program[0] == sys.executable else program[0]
        # A command may have something to save when it is asked to end.
        return cls(**_common(arguments), command=program, what=name, patience=COMMANDS_PATIENCE)

    @classmethod
    def of_cell(cls, arguments: argparse.Namespace, source: str, pushed: str) -> Call:
        """Return the call that runs a cell's body.

        Args:
            arguments: the options of the magic's line.
            source: the body.
            pushed: what `pack_names` returned.
        """
        packed = rank_cell.pack(
            source,
            push=pushed,
            wanted=bool(arguments.out),
            paths=[path for path in sys.path if path],
        )
        command = [sys.executable, "-m", rank_cell.__name__]
        return cls(**_common(arguments), command=command, cell=packed)

    @property
    def is_command(self) -> bool:
        """Whether a command is run, not a cell."""
        return not self.cell

    @property
    def is_local(self) -> bool:
        """Whether every rank is on this host."""
        names = _LOCAL | {socket.gethostname()}
        return self.hosts is None or all(host in names for host in self.hosts)

    @property
    def arguments(self) -> list[str]:
        """The whole call, horovodrun first."""
        return [*self.launcher, *self.command]

    @contextmanager
    def ready(self) -> Iterator[Job]:
        """Yield the job, with the cell where its ranks find it.

        Raises:
            DistributedError: Horovod is not installed, or a cell for other hosts is too large.
        """
        env = {**inherited(), **self.env}
        with tempfile.TemporaryDirectory(prefix="horovodrun-") as folder:
            if self.cell:
                env[rank_cell.VARIABLE] = self._place(Path(folder, "cell"))
            find_horovodrun()
            if self.timeout:
                env[rank_cell.DEADLINE] = str(time.time() + self.timeout)
            yield Job(
                self.arguments, self.size, env, self.cwd, os.getpid(), self.patience,
                gentle=self.is_command, elastic=self.elastic, timeout=self.timeout,
                log_dir=self.log_dir,
            )  # fmt: skip

    def describe(self) -> str:
        """Return what would be run, in lines.

        Raises:
            DistributedError: it could not be run, because Horovod is not installed.
        """
        find_horovodrun()
        threads = self.env["OMP_NUM_THREADS"]
        shown = [Path(word).name if word == sys.executable else word for word in self.arguments]
        hosts = "this host" if self.hosts is None else _joined(self.hosts)
        return "\n".join(
            [
                shlex.join(shown),
                f"{self.size} ranks on {hosts}, CPU threads of each: {threads}",
                "nothing was started",
            ]
        )

    def _place(self, path: Path) -> str:
        if self.is_local:
            path.write_bytes(self.cell)
            return f"@{path}"
        text = base64.b64encode(self.cell).decode()
        if len(text) > LARGEST_INLINE:
            raise DistributedError(
                f"the cell and what it is given take {len(text) / 1024:.0f} KiB, and other hosts"
                f" can be sent {LARGEST_INLINE // 1024}: save data to a file that every host has"
            )
        return text


def find_horovodrun() -> str:
    """Return the path of the horovodrun that belongs to this Python.

    Raises:
        DistributedError: there is none.
    """
    path = Path(sys.executable).with_name("horovodrun")
    if not path.exists():
        raise DistributedError(
            f"there is no horovodrun beside {sys.executable}:"
            f" run {command('horovod_lm.install_horovod')}"
        )
    return str(path)


def inherited() -> dict[str, str]:
    """Return the kernel's environment, without what is meant for the kernel alone."""
    env = {name: value for name, value in os.environ.items() if not _NOT_PASSED_ON.match(name)}
    commands = str(Path(sys.executable).parent)
    return {**env, "PATH": os.pathsep.join([commands, env.get("PATH", "")])}


def share_the_cores(ranks: int, threads: int | None, cores: int | None = None) -> int:
    """Return how many threads each rank of this host takes; warn where there are too few cores.

    Args:
        ranks: how many of them are on this host.
        threads: what the user asks for; None: a fair share.
        cores: how many there are; default: those that this process may use.
    """
    cores = cores or available_cores()
    share = threads or max(1, cores // ranks)
    if ranks * share > cores:
        print(
            f"warning: {ranks} ranks with {share} threads each want {ranks * share} cores, and"
            f" {cores} are here: they will take turns, and run slower than fewer would",
            file=sys.stderr,
        )
    return share


def read_hosts(hosts: str | None, hostfile: str | None) -> dict[str, int] | None:
    """Return slots by host, from `-H`'s text or from a hostfile, whose comments are left out.

    Raises:
        ConfigError: a host is not written as it must be, or the file cannot be read.
    """
    if hosts and hostfile:
        raise ConfigError("-H and --hostfile both name hosts: give one of them")
    if hosts:
        pairs = [_host_of(text, *text.rpartition(":")[::2]) for text in hosts.split(",")]
    elif hostfile:
        try:
            lines = Path(hostfile).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"the hostfile {hostfile} cannot be read: {error.strerror}") from None
        # Horovod: horovodrun itself ends with an IndexError at a comment or a blank line.
        stripped = [line.partition("#")[0].strip() for line in lines]
        found = [(line, _HOST.match(line)) for line in stripped if line]
        pairs = [_host_of(line, *(match.groups() if match else ("", ""))) for line, match in found]
    else:
        return None
    return dict(pairs)


def _host_of(text: str, name: str, slots: str) -> tuple[str, int]:
    if not name or not slots.isdigit() or int(slots) < 1:
        raise ConfigError(
            f"the host {text.strip()!r} has no number of slots: write NAME:2 after -H, or"
            " NAME slots=2 in a hostfile"
        )
    return name.strip(), int(slots)


def _common(arguments: argparse.Namespace) -> dict:
    hosts = read_hosts(arguments.hosts, arguments.hostfile)
    slots = sum(hosts.values()) if hosts else None
    size = arguments.np if arguments.np is not None else slots or 2
    if size < 1:
        raise ConfigError(f"-np {size}: there must be at least one rank")
    if slots is not None and slots != size:
        # Horovod: it starts one process per slot, however many -np asks for.
        raise ConfigError(f"-np {size} and the hosts' {slots} slots differ: make them equal")
    stall = {} if arguments.stall is None else _stall(arguments.stall)
    here = max(hosts.values()) if hosts else size
    threads = share_the_cores(here, arguments.threads)
    where = ["-H", _joined(hosts)] if hosts else []
    launcher = ["horovodrun", "-np", str(size), *where]
    if arguments.elastic:
        launcher = _elastic_launcher(arguments, size)
    return {
        "size": size,
        "hosts": hosts,
        "launcher": [*launcher, *_options(arguments)],
        "elastic": bool(arguments.elastic),
        "env": {
            **stall,
            "OMP_NUM_THREADS": str(threads),
            **_env(arguments.env),
        },
        "timeout": arguments.timeout,
    }


def _elastic_launcher(arguments: argparse.Namespace, size: int) -> list[str]:
    """Return horovodrun's elastic call, which follows a file of hosts; it is written if need be."""
    if arguments.hosts or arguments.hostfile:
        raise ConfigError(
            "--elastic takes its hosts from its own file: leave -H and --hostfile out"
        )
    file = Path(arguments.elastic)
    if not file.exists():
        write_hosts(file, [f"{loopback_name(number)}:1" for number in range(size)])
    return elastic_command([], file, arguments.min_np, arguments.max_np, size)


def _options(arguments: argparse.Namespace) -> list[str]:
    names = {
        "timeline": "--timeline-filename",
        "fusion_threshold_mb": "--fusion-threshold-mb",
        "cycle_time_ms": "--cycle-time-ms",
        "ssh_port": "--ssh-port",
        "ssh_identity_file": "--ssh-identity-file",
        "network_interface": "--network-interfaces",
    }
    words: list[str] = []
    for name, option in names.items():
        value = getattr(arguments, name)
        if value is not None:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def _stall(seconds: int) -> dict[str, str]:
    # Horovod: it looks as often as it warns, and sees a limit pass at the next look only.
    looks = [each for each in (5, 4, 3, 2, 1) if seconds % each == 0]
    return {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(looks[0] if seconds else 60),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(seconds),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(max(30, 2 * seconds)),
    }


def _env(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not re.match(r"^[A-Za-z_]\w*=", pair):
            raise ConfigError(f"--env {pair}: write NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _joined(hosts: dict[str, int]) -> str:
    return ",".join(f"{name}:{slots}" for name, slots in hosts.items())
