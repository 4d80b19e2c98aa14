"""Several hosts: horovodrun's hostfile and call, written from the configuration.

    python -m horovod_lm.utils.cluster --config configs/cluster.yaml

horovodrun reads its hostfile word by word: a comment or a blank line ends it with an IndexError.
So the hosts stand in the YAML file, where they can be commented, and the hostfile is written.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from horovod_lm.utils.cli import add_config_arguments, run_cli
from horovod_lm.utils.config import Config, HostConfig, load_config
from horovod_lm.utils.errors import ConfigError

DEFAULT_HOSTFILE = "runs/hostfile"


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
        The arguments, `horovodrun` first, for `subprocess.run` or `shlex.join`.

    Raises:
        ConfigError: the hosts are not valid, or the command is empty.
    """
    if not command:
        raise ConfigError("horovodrun needs a command to run on each rank")
    settings = config.distributed
    # Always all slots: with fewer, horovodrun would still start one process per slot.
    ranks = sum(host.slots for host in checked_hosts(config))
    call = ["horovodrun", "-np", str(ranks), "--hostfile", str(config.resolve(hostfile))]
    if settings.interface:
        call += ["--network-interfaces", settings.interface]
    if settings.ssh_port:
        call += ["--ssh-port", str(settings.ssh_port)]
    if settings.ssh_identity_file:
        call += ["--ssh-identity-file", str(config.resolve(settings.ssh_identity_file))]
    return [*call, *command]


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
        "hosts. Nothing is started.",
        epilog='To start it at once: eval "$(python -m horovod_lm.utils.cluster)"',
    )
    add_config_arguments(parser, default="configs/cluster.yaml")
    parser.add_argument(
        "--hostfile",
        default=DEFAULT_HOSTFILE,
        metavar="PATH",
        help=f"where to write it (default: {DEFAULT_HOSTFILE} in the project's folder)",
    )
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="after --: what to run instead of training"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    training = ["python", "-m", "horovod_lm.train", "--config", arguments.config]
    for override in arguments.overrides:
        training += ["--set", override]
    hostfile = write_hostfile(config, arguments.hostfile)
    for name in unknown_hosts(config):
        print(
            f"warning: {name} has no address known here: check distributed.hosts", file=sys.stderr
        )
    print(shlex.join(horovodrun_command(config, arguments.command or training, hostfile)))
    return 0


if __name__ == "__main__":
    run_cli(main)
