"""Elastic jobs: the file of hosts, and horovodrun's call that follows it while it changes.

    python -m horovod_lm.launch.elastic_hosts runs/hosts --workers 2  # writes it, prints the call

The file is plain text, `name:slots` a line. horovodrun runs a discovery script once a second to
learn which hosts there are; ours prints that file. A line more lets a worker join, a line less
lets one leave.

horovodrun gives up a *host*, not a process: after one failure on a host it starts nothing there
again, and on one machine the first death would end the job. So on one machine each worker gets a
name of its own for it (`localhost`, `127.0.0.1`, `127.0.0.01`, ...), and horovodrun takes them for
as many hosts. To let a worker join after one has died, add a name that was not used before.

On several hosts, horovodrun counts a rank among those of the next world for as long as its ssh
lives. A host that loses power ends no connection: `~/.ssh/config` on the first host must let ssh
ask (`ServerAliveInterval 2`, `ServerAliveCountMax 3`).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import psutil

from horovod_lm.utils.cli import add_config_arguments, program, run_cli
from horovod_lm.utils.config import load_config
from horovod_lm.utils.errors import ConfigError

LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"([\w.-]+)\s*(?::\s*([1-9][0-9]*))?")


def loopback_name(number: int) -> str:
    """Return a name of this machine that differs from those for other numbers, counted from 0."""
    # The last byte of an address may have leading zeros: all these mean 127.0.0.1.
    return f"127.0.0.{'1':0>{number}}" if number else "localhost"


def write_hosts(path: str | Path, hosts: Sequence[str]) -> Path:
    """Write the file of hosts, whole or not at all: horovodrun reads it at any time.

    Args:
        path: the file; its folder is made.
        hosts: `name:slots` each.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_hosts(path: str | Path) -> dict[str, int]:
    """Return the slots of each host in a file of hosts; comments (`#`) and blank lines are fine.

    Raises:
        ConfigError: the file cannot be read, or a line is not `name:slots`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file of hosts {path} cannot be read: {error}") from None
    hosts = {}
    for number, line in enumerate(lines, start=1):
        if entry := line.partition("#")[0].strip():
            found = _HOST.fullmatch(entry)
            if not found:
                raise ConfigError(
                    f"{path}, line {number}: {entry!r} is not a host: write NAME:SLOTS, for"
                    " example localhost:2"
                )
            hosts[found[1]] = int(found[2] or 1)
    return hosts


def write_discovery_script(hosts_file: str | Path) -> Path:
    """Write, beside the file of hosts, the script with which horovodrun reads it."""
    hosts_file = Path(hosts_file).resolve()
    script = hosts_file.with_name(f"{hosts_file.name}.discovery.sh")
    # horovodrun fails on comments and blank lines. A shell starts at once; Python would not.
    clean = f"sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' {shlex.quote(str(hosts_file))}"
    script.write_text(f"#!/bin/sh\nexec {clean}\n", encoding="utf-8")
    script.chmod(0o755)
    return script


def elastic_command(
    command: Sequence[str],
    hosts_file: str | Path,
    min_np: int = 1,
    max_np: int | None = None,
    np: int | None = None,
    timeout_seconds: int = 75,
    interface: str | None = None,
    ssh_port: int | None = None,
    ssh_identity_file: str | Path | None = None,
) -> list[str]:
    """Return horovodrun's call that starts `command` on ranks that may come and go.

    Args:
        command: what each rank runs, for example `["python", "-m", "horovod_lm.train",
            "--elastic", "--config", "configs/tiny.yaml"]`.
        hosts_file: see `write_hosts`; horovodrun follows its changes.
        min_np: with fewer ranks training saves and ends.
        max_np: more ranks are never started; None: as many as the file has slots.
        np: ranks at the start; None: as many as the file has slots now.
        timeout_seconds: how long horovodrun waits for enough slots before it ends all ranks: longer
            than the ranks' own `training.elastic_timeout_seconds`, after which they save and end.
            The job has ended when this time is over.
        interface: network interface for all traffic; None: the loopback's, if every host is a name
            of this machine as `loopback_name` gives it, else horovodrun's choice.
        ssh_port: of the other hosts; None: as ssh itself is set up.
        ssh_identity_file: the private key for them; None: as ssh itself is set up.

    Raises:
        ConfigError: the file cannot be read, a line of it is not `name:slots`, or it has no host.
    """
    hosts = read_hosts(hosts_file)
    if not hosts:
        raise ConfigError(f"{hosts_file} has no host: write a line NAME:SLOTS for each")
    if interface is None and all(is_loopback(host) for host in hosts):
        interface = loopback_interface()  # horovodrun looks for others, and then for two hosts
    call = [program("horovodrun"), "-np", str(np or sum(hosts.values()))]
    call += ["--min-np", str(min_np)]
    if max_np is not None:
        call += ["--max-np", str(max_np)]
    # horovodrun gives both the script and the key to a shell as they are.
    call += ["--host-discovery-script", shlex.quote(str(write_discovery_script(hosts_file)))]
    call += ["--elastic-timeout", str(timeout_seconds)]
    if interface is not None:
        call += ["--network-interfaces", interface]
    if ssh_port is not None:
        call += ["--ssh-port", str(ssh_port)]
    if ssh_identity_file is not None:
        call += ["--ssh-identity-file", shlex.quote(str(ssh_identity_file))]
    return [*call, *command]


def is_loopback(host: str) -> bool:
    """Return whether a host is one of `loopback_name`'s."""
    return host == "localhost" or host.startswith("127.0.0.")


def loopback_interface() -> str:
    """Return the name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == LOOPBACK for address in addresses)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write a file of hosts for workers on this machine; print the call that follows it."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.launch.elastic_hosts",
        description="Write a file of hosts, and print the call of an elastic job that follows it.",
    )
    parser.add_argument("hosts_file", help="name:slots a line; kept if it is there")
    add_config_arguments(parser, default="configs/tiny.yaml")
    parser.add_argument("--workers", type=int, default=2, help="on this machine (default: 2)")
    parser.add_argument("--min-np", type=int, default=1, help="with fewer, save and end")
    parser.add_argument("--max-np", type=int, help="never start more")
    parser.add_argument("--interface", help="the network interface that other hosts share")
    parser.add_argument("--ssh-port", type=int, help="of other hosts")
    parser.add_argument("--ssh-identity-file", help="the private key for other hosts")
    arguments = parser.parse_args(argv)
    load_config(arguments.config, arguments.overrides)  # else each rank would report the error
    if not Path(arguments.hosts_file).exists():
        names = [f"{loopback_name(number)}:1" for number in range(arguments.workers)]
        write_hosts(arguments.hosts_file, names)
    training = [program("python"), "-m", "horovod_lm.train", "--elastic"]
    training += ["--config", arguments.config]
    for override in arguments.overrides:
        training += ["--set", override]
    call = elastic_command(
        training,
        arguments.hosts_file,
        arguments.min_np,
        arguments.max_np,
        interface=arguments.interface,
        ssh_port=arguments.ssh_port,
        ssh_identity_file=arguments.ssh_identity_file,
    )
    print(shlex.join(call))
    return 0


if __name__ == "__main__":
    run_cli(main)
