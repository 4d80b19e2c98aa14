"""Elastic jobs: a file of hosts, and the horovodrun command that follows its changes.

    python -m horovod_lm.launch.elastic_hosts runs/hosts --workers 2  # write it, print the command

Each line of the file is `name:slots`. horovodrun runs a discovery script once a second to learn the
hosts; ours prints the file. An added line lets a worker join, a deleted line lets one leave.

After one failure on a host, horovodrun starts nothing there again. On one machine the first failure
would end the job, so each worker gets its own name of the machine (`localhost`, `127.0.0.1`,
`127.0.0.01`, ...), and horovodrun takes the names for different hosts. To let a worker join after
one has died, add a name that was not used before.

On several hosts, horovodrun counts a rank as alive while its ssh connection is open, and a host
that loses power closes no connection. Set `ServerAliveInterval 2` and `ServerAliveCountMax 3` in
`~/.ssh/config` on the first host.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from horovod_lm.launch.hosts import (
    replace_file,
    ssh_options,
    training_command,
    with_environment,
    write_environment,
)
from horovod_lm.utils.cli import add_config_arguments, program, run_cli
from horovod_lm.utils.config import Config, load_config
from horovod_lm.utils.errors import ConfigError

LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"([\w.-]+)\s*(?::\s*([1-9][0-9]*))?")


def loopback_name(number: int) -> str:
    """Return the name of this machine with this number, counted from 0; no two are equal."""
    # The last byte of an address may have leading zeros: all these mean 127.0.0.1.
    return f"127.0.0.{'1':0>{number}}" if number else "localhost"


def write_hosts(path: str | Path, hosts: Sequence[str]) -> Path:
    """Write a file of hosts, `name:slots` each, atomically: horovodrun may read it at any time.

    Raises:
        ConfigError: it cannot be written.
    """
    replace_file(Path(path), "".join(f"{host}\n" for host in hosts))
    return Path(path)


def read_hosts(path: str | Path) -> dict[str, int]:
    """Return the slots of each host in a file of hosts; it may have `#` comments and blank lines.

    Raises:
        ConfigError: the file cannot be read, a line is not `name:slots`, or a host is named twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file of hosts {path} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if entry := line.partition("#")[0].strip():
            found = _HOST.fullmatch(entry)
            if not found:
                raise ConfigError(
                    f"{path}, line {number}: {entry!r} is not a host: write NAME:SLOTS, for"
                    " example localhost:2"
                )
            if found[1] in hosts:
                raise ConfigError(
                    f"{path}, line {number}: {found[1]} is named twice: name it once, with the sum"
                    " of its slots"
                )
            hosts[found[1]] = int(found[2] or 1)
    return hosts


# Prints the hosts of a file, without comments, blank lines and spaces. If a line is wrong or there
# is none, it fails: horovodrun then warns, and keeps the hosts that it has.
_DISCOVERY = r"""#!/bin/sh
hosts=$(sed 's/#.*//; s/[[:space:]]//g; /^$/d' {file})
if [ -z "$hosts" ] || echo "$hosts" | grep -Evx '[A-Za-z0-9_.-]+(:[1-9][0-9]*)?' >&2; then
    echo 'wrong line, or no host, in' {file} >&2
    exit 1
fi
echo "$hosts"
"""


def write_discovery_script(hosts_file: str | Path) -> Path:
    """Write, beside a file of hosts, the script with which horovodrun reads it."""
    hosts_file = Path(hosts_file).resolve()
    script = hosts_file.with_name(f"{hosts_file.name}.discovery.sh")
    text = _DISCOVERY.replace("{file}", shlex.quote(str(hosts_file)))
    replace_file(script, text, 0o755)  # a job that runs may be executing the old one
    return script


def elastic_command(
    command: Sequence[str],
    hosts_file: str | Path,
    min_np: int = 1,
    max_np: int | None = None,
    timeout_seconds: int = 75,
    config: Config | None = None,
) -> list[str]:
    """Return the horovodrun command that starts `command` on ranks that may leave and join.

    Args:
        command: what each rank runs, for example `["python", "-m", "horovod_lm.train",
            "--elastic", "--config", "configs/tiny.yaml"]`.
        hosts_file: see `write_hosts`; horovodrun follows its changes.
        min_np: with fewer ranks training saves and ends.
        max_np: the largest number of ranks; None: as many as the file has slots.
        timeout_seconds: how long horovodrun waits for enough slots before it ends all ranks: longer
            than the ranks' own `training.elastic_timeout_seconds`, after which they save and end.
        config: its `distributed` section has the interface, the options of ssh, and environment
            variables. Without an interface it is the loopback interface if every host is a name of
            this machine (`loopback_name`), else horovodrun's choice.

    Raises:
        ConfigError: the file cannot be read or has no host, a line of it is not `name:slots`, or a
            file cannot be written beside it.
    """
    config, hosts_file = config or Config(), Path(hosts_file).absolute()
    hosts = read_hosts(hosts_file)
    if not hosts:
        raise ConfigError(f"{hosts_file} has no host: write a line NAME:SLOTS for each")
    interface = config.distributed.interface
    if interface is None and all(h == "localhost" or h.startswith("127.0.0.") for h in hosts):
        interface = loopback_interface()  # else horovodrun looks for one that the hosts share
    call = [program("horovodrun"), "-np", str(sum(hosts.values())), "--min-np", str(min_np)]
    call += [] if max_np is None else ["--max-np", str(max_np)]
    # horovodrun passes the script to a shell without quotes.
    call += ["--host-discovery-script", shlex.quote(str(write_discovery_script(hosts_file)))]
    call += ["--elastic-timeout", str(timeout_seconds)]
    call += [] if interface is None else ["--network-interfaces", interface]
    write_environment(config, hosts_file)
    return [*call, *ssh_options(config), *with_environment(config, hosts_file, command)]


def loopback_interface() -> str:
    """Return the name of the loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


def main(argv: Sequence[str] | None = None) -> int:
    """Write a file of hosts for workers on this machine; print the command that follows it."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.launch.elastic_hosts",
        description="Write a file of hosts, and print the command of an elastic job that follows"
        " its changes. Interface, ssh and environment come from the configuration's distributed"
        " section.",
    )
    parser.add_argument("hosts_file", help="name:slots a line; an existing file is not changed")
    add_config_arguments(parser, default="configs/tiny.yaml")
    parser.add_argument("--workers", type=int, default=2, help="on this machine (default: 2)")
    parser.add_argument("--min-np", type=int, default=1, help="with fewer ranks, save and end")
    parser.add_argument("--max-np", type=int, help="the largest number of ranks")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {arguments.workers}")
    config = load_config(arguments.config, arguments.overrides)
    if not Path(arguments.hosts_file).exists():
        names = [f"{loopback_name(number)}:1" for number in range(arguments.workers)]
        write_hosts(arguments.hosts_file, names)
    call = elastic_command(
        training_command(arguments, "--elastic"),
        arguments.hosts_file,
        arguments.min_np,
        arguments.max_np,
        config=config,
    )
    print(shlex.join(call))
    return 0


if __name__ == "__main__":
    run_cli(main)
