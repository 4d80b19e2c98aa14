"""Compare hosts: before training starts, and for `horovod_lm.setup.doctor --hosts`.

The doctor starts this module on each host (`python -m horovod_lm.training.host_check`). It answers
each line of JSON on its standard input with one line, and ends with its input.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.utils.config import Config, config_from_dict
from horovod_lm.utils.errors import DistributedError
from horovod_lm.utils.machine import package_version

SECONDS_TO_CONNECT = 3.0
HASH_LENGTH = 12
END_BYTES = 2**20  # of a token file, which may have many GB
# Ranks that differ in one of these would all train, but not the same model on the same data.
DECISIVE = ("torch", "horovod", "code", "data")


def main() -> int:
    """Answer questions until the input ends.

    A question has "config" and "root" (answered with `host_facts`), or "peers" (with `call_peers`).
    Each answer has the host's "time", in seconds since 1970.
    """
    # On all interfaces: which one the ranks will use is checked.
    with socket.create_server(("", 0), backlog=64) as server:
        for line in sys.stdin:
            question = json.loads(line)
            if "config" in question:
                config = config_from_dict(question["config"], question["root"])
                answer = {**host_facts(config), "port": server.getsockname()[1]}
            else:
                answer = call_peers(question["peers"])
            print(json.dumps({**answer, "time": time.time()}), flush=True)
    return 0


def host_facts(config: Config) -> dict[str, Any]:
    """Return what must be equal on all hosts, and the addresses of this one."""
    state = psutil.net_if_stats()
    interfaces = {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and name in state and state[name].isup
    }
    wanted = config.distributed.interface
    own = next((one for one in interfaces.values() if not one.startswith("127.")), "127.0.0.1")
    return {
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "horovod": package_version("horovod"),
        "code": hash_of_code(Path(__file__).parents[1]),
        "data": hash_of_data(config.resolve(config.data.data_dir)),
        "interfaces": interfaces,
        "address": interfaces.get(wanted) if wanted else own,
    }


def check_hosts_agree(config: Config) -> None:
    """Compare torch, Horovod, code and data of all ranks before training; every rank calls this.

    Raises:
        DistributedError: on every rank, naming a host that differs from rank 0's.
    """
    from horovod_lm.utils import distributed  # imports torch, which the doctor does not need

    if distributed.get_world_size() == 1:
        return
    facts = host_facts(config)
    # Horovod: the ranks themselves compare only the shapes of gradients.
    first, *others = distributed.gather_objects(
        {what: facts[what] for what in ("host", *DECISIVE)}, name="host_facts"
    )
    for rank, other in enumerate(others, start=1):
        for what in DECISIVE:
            if other[what] != first[what]:
                raise DistributedError(
                    f"{what} of rank {rank} on {other['host']} is {other[what]}, but rank 0 on"
                    f" {first['host']} has {first[what]}:"
                    f" {fix_difference(what, other['host'], first['host'], config)}"
                )


def fix_difference(what: str, host: str, first: str, config: Config) -> str:
    """Return how to fix a host that differs from the first one."""
    if what == "code":
        return f"copy the project from {first} to {host}: the same commit, no local changes"
    if what == "data":
        folder = config.resolve(config.data.data_dir)
        return f"on {host}, delete {folder}: training prepares it again"
    return f"on {host}: make setup"


def hash_of_code(folder: Path) -> str:
    """Return a hash of the names and contents of a package's Python files."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder)}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:HASH_LENGTH]


def hash_of_data(folder: Path) -> str | None:
    """Return a hash of prepared data, or None if there are none.

    It covers all of the JSON files, and of the token files the size and both ends.
    """
    if not (folder / "metadata.json").is_file():
        return None
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        total.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as content:
            total.update(content.read(END_BYTES))
            if file.suffix == ".bin":
                content.seek(max(0, size - END_BYTES))
            total.update(content.read())
    return total.hexdigest()[:HASH_LENGTH]


def call_peers(peers: dict[str, list[Any]]) -> dict[str, Any]:
    """Connect to each host's address and port; return who answers, and why others do not."""
    reached, failed = [], {}
    for name, (address, port) in peers.items():
        try:
            with socket.create_connection((address, port), SECONDS_TO_CONNECT):
                reached.append(name)
        except OSError as error:
            failed[name] = f"{address}:{port} {error.strerror or error}"
    return {"reached": reached, "failed": failed}


if __name__ == "__main__":
    sys.exit(main())
