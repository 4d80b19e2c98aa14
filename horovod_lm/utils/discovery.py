"""Elastic jobs: the file of hosts, and horovodrun's call that follows it while it changes.

    python -m horovod_lm.utils.discovery runs/hosts --workers 2

The file of hosts is plain text, one `name:slots` a line. horovodrun runs a discovery script once
a second to learn which hosts there are; ours prints that file. To add a line is to let a worker
join, to remove one is to let it leave.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import psutil


def write_hosts(path: str | Path, hosts: Sequence[str]) -> Path:
    """Write the file of hosts, whole or not at all: horovodrun reads it at any time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
    os.replace(temporary, path)
    return path


def loopback_hosts(workers: int) -> list[str]:
    return [f"{loopback_name(number)}:1" for number in range(workers)]


def loopback_name(number: int) -> str:
    return f"127.0.0.{'0' * (number - 1)}1" if number else "localhost"


def write_discovery_script(hosts_file: str | Path) -> Path:
    hosts_file = Path(hosts_file).resolve()
    script = hosts_file.with_name(f"{hosts_file.name}.discovery.sh")
    script.write_text(
        f"#!/bin/sh\nexec sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' {shlex.quote(str(hosts_file))}\n",
        encoding="utf-8",
    )
    script.chmod(0o755)
    return script


def elastic_command(
    command: Sequence[str],
    hosts_file: str | Path,
    min_np: int = 1,
    max_np: int | None = None,
    elastic_timeout_seconds: int = 60,
    interface: str | None = None,
    np: int | None = None,
) -> list[str]:
    lines = Path(hosts_file).read_text().split()
    np = np or sum(int(line.split(":")[1]) for line in lines)
    call = ["horovodrun", "-np", str(np), "--min-np", str(min_np)]
    if max_np:
        call += ["--max-np", str(max_np)]
    call += ["--host-discovery-script", str(write_discovery_script(hosts_file))]
    call += ["--network-interfaces", interface or loopback_interface()]
    call += ["--elastic-timeout", str(elastic_timeout_seconds)]
    return [*call, *command]


def loopback_interface() -> str:
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    )
