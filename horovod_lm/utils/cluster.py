"""Several hosts: horovodrun's hostfile and call, written from the configuration.

    python -m horovod_lm.utils.cluster --config configs/cluster.yaml

horovodrun reads its hostfile word by word: a comment or a blank line ends it with an IndexError.
So the hosts stand in the YAML file, where they can be commented, and the hostfile is written.
"""

from __future__ import annotations

import argparse
import re
import shlex
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from horovod_lm.utils.cli import add_config_arguments, program, run_cli
from horovod_lm.utils.config import Config, HostConfig, load_config
from horovod_lm.utils.errors import ConfigError

DEFAULT_HOSTFILE = "runs/hostfile"
# What our own ssh takes along to another host; horovodrun takes the whole environment.
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
# Variables that horovodrun keeps from other hosts (horovod/runner/common/util/env.py).
_NOT_PASSED_ON = re.compile("BASH_FUNC_.*|OLDPWD|.*CUDA_VISIBLE_DEVICES|_HOROVOD_SECRET_KEY")


def hostfile_text(config: Config) -> str:
    """Return the content of horovodrun's hostfile: one line `name slots=N` per host, nothing else.

    Raises:
        ConfigError: there are no hosts, or one stands there twice.
    """
    return "".join(f"{host.name} slots={host.slots}\n" for host in checked_hosts(config))


def write_hostfile(config: Config, path: str | Path) -> Path:
    """Write the hostfile and return its path; a relative one starts at the project root.

    Raises:
        ConfigError: the hosts are not valid, or the file cannot be written.
    """
    text, path = hostfile_text(config), config.resolve(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the hostfile {path} cannot be written: {error.strerror}") from None
    return path


def horovodrun_command(
    config: Config, command: Sequence[str], hostfile: str | Path = DEFAULT_HOSTFILE
) -> list[str]:
    """Return the call of horovodrun that starts `command` on every slot of every host.

    Args:
        config: its `distributed` section names hosts, interface, and ssh's port and key.
        command: what each rank runs, for example `["python", "-m", "horovod_lm.train"]`.
        hostfile: what `write_hostfile` wrote; a relative path starts at the project root.

    Returns:
        The words, `horovodrun` or its path first, for `subprocess.run` or `shlex.join`.

    Raises:
        ConfigError: the hosts are not valid, or the command is empty.
    """
    if not command:
        raise ConfigError("horovodrun needs a command to run on each rank")
    settings = config.distributed
    # Always all slots: with fewer, horovodrun would still start one process per slot.
    ranks = sum(host.slots for host in checked_hosts(config))
    here, there = _split_environment(settings.environment)
    call = ["env", *here] if here else []
    # Else horovodrun believes for an hour that ssh works where it once did.
    call += [program("horovodrun"), "-np", str(ranks), "--disable-cache"]
    call += ["--hostfile", str(config.resolve(hostfile))]
    if settings.interface:
        call += ["--network-interfaces", settings.interface]
    if settings.ssh_port:
        call += ["--ssh-port", str(settings.ssh_port)]
    if settings.ssh_identity_file:
        call += ["--ssh-identity-file", _key_and_user(config)]
    command = _with_own_environment(settings.hosts, command)
    return [*call, *(["env", *there] if there else []), *command]


def _key_and_user(config: Config) -> str:
    # horovodrun has no option for ssh's user and refuses user@host, but puts what it is told of the
    # key into ssh's command line as it stands (horovod/runner/util/remote.py).
    key = shlex.quote(str(config.resolve(config.distributed.ssh_identity_file)))
    user = config.distributed.ssh_user
    return f"{key} -l {user}" if user else key


def _split_environment(environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return what horovodrun gets and passes on, and what each rank must set for itself."""
    here, there = [], []
    for name, value in environment.items():
        (there if _NOT_PASSED_ON.match(name) else here).append(f"{name}={value}")
    return here, there


def _with_own_environment(hosts: Sequence[HostConfig], command: Sequence[str]) -> list[str]:
    """Return `command`, in a shell that first sets what its host alone has."""
    cases = [
        f"{host.name}) export {shlex.join(f'{k}={v}' for k, v in host.environment.items())};;"
        for host in hosts
        if host.environment
    ]
    if not cases:
        return list(command)
    script = f'case $HOROVOD_HOSTNAME in {" ".join(cases)} esac; exec "$@"'
    return ["sh", "-c", script, "sh", *command]


def ssh_command(config: Config, host: str, command: str, seconds: int = 5) -> list[str]:
    """Return the call of ssh that runs a line of shell on a host, as horovodrun would.

    Args:
        config: its `distributed` section says how to log in.
        host: the name of the host.
        command: a line for the host's shell.
        seconds: to wait for a connection.
    """
    settings = config.distributed
    call = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    call += ["-o", f"ConnectTimeout={seconds}"]
    if settings.ssh_port:
        call += ["-p", str(settings.ssh_port)]
    if settings.ssh_identity_file:
        call += ["-i", str(config.resolve(settings.ssh_identity_file))]
    if settings.ssh_user:
        call += ["-l", settings.ssh_user]
    return [*call, host, command]


def checked_hosts(config: Config) -> list[HostConfig]:
    """Return the configuration's hosts.

    Raises:
        ConfigError: there are none, or one stands there twice.
    """
    hosts = config.distributed.hosts
    if not hosts:
        raise ConfigError(
            "distributed.hosts is empty: name the machines there, as configs/cluster.yaml does"
        )
    name, times = Counter(host.name for host in hosts).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"distributed.hosts names {name} {times} times: name it once, with the sum of its slots"
        )
    return hosts


def unknown_hosts(config: Config) -> list[str]:
    """Return the names of hosts that this machine cannot turn into an address."""
    return [host.name for host in checked_hosts(config) if not _has_address(host.name)]


def check_names(config: Config) -> None:
    """Make sure that each host has an address here, and that no two of them are this machine.

    Raises:
        ConfigError: horovodrun would look for a host that is not there, or start its ranks here.
    """
    for name in unknown_hosts(config):
        raise ConfigError(
            f"{name} has no address known here: correct it in distributed.hosts, or add a line"
            f" 'ADDRESS {name}' to /etc/hosts"
        )
    here = [host.name for host in checked_hosts(config) if is_this_machine(host.name)]
    if len(here) > 1:
        address = socket.gethostbyname(here[-1])
        raise ConfigError(
            f"{' and '.join(here)} both mean this machine ({here[-1]} is {address} here):"
            " correct their addresses in /etc/hosts, or name the machine once with all its slots"
        )


def is_this_machine(name: str) -> bool:
    """Return whether a host's name means an address of this machine, as horovodrun sees it."""
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return False
    mine = {one.address for all_of in psutil.net_if_addrs().values() for one in all_of}
    return address in mine or address.startswith("127.")


def _has_address(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.utils.cluster",
        description="Write horovodrun's hostfile and print the call that starts a job on several "
        "hosts. Nothing is started without --run.",
    )
    add_config_arguments(parser, default="configs/cluster.yaml")
    parser.add_argument(
        "--hostfile",
        default=DEFAULT_HOSTFILE,
        metavar="PATH",
        help=f"where to write it (default: {DEFAULT_HOSTFILE} in the project's folder)",
    )
    parser.add_argument(
        "--run", action="store_true", help="start it too, and explain how it ended if not well"
    )
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="after --: what to run instead of training"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    training = [program("python"), "-m", "horovod_lm.train", "--config", arguments.config]
    for override in arguments.overrides:
        training += ["--set", override]
    hostfile = write_hostfile(config, arguments.hostfile)
    command = arguments.command or training
    if arguments.run:
        from horovod_lm.utils.cluster_run import run

        run(config, command, hostfile)
        return 0
    for name in unknown_hosts(config):
        print(
            f"warning: {name} has no address known here: check distributed.hosts", file=sys.stderr
        )
    print(shlex.join(horovodrun_command(config, command, hostfile)))
    return 0


if __name__ == "__main__":
    run_cli(main)
