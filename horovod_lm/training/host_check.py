"""What one host finds on itself: `horovod_lm.setup.doctor --hosts` starts this on each of them.

    python -m horovod_lm.training.host_check

It answers each line of JSON that it reads with one, and ends with its input.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.utils import distributed
from horovod_lm.utils.config import Config, config_from_dict
from horovod_lm.utils.errors import DistributedError

SECONDS_TO_CONNECT = 3.0
LETTERS = 12  # of a hash: as many as people compare by eye
END_BYTES = 2**20  # of a file of tokens: it may have many GB
# Ranks that differ in one of these would train on, each on something else.
DECISIVE = ("torch", "horovod", "code", "data")


def main() -> int:
    """Answer until the input ends."""
    # Every interface: which one the ranks take is what is being found out.
    with socket.create_server(("", 0), backlog=64) as server:
        for line in sys.stdin:
            question = json.loads(line)
            if "config" in question:
                config = config_from_dict(question["config"], question["root"])
                answer = {**facts(config), "port": server.getsockname()[1]}
            elif "peers" in question:
                answer = call_all(question["peers"])
            else:
                answer = {"time": time.time()}
            print(json.dumps(answer), flush=True)
    return 0


def facts(config: Config) -> dict[str, Any]:
    """Return what must be the same on every host, and where this one can be called."""
    interfaces = addresses()
    wanted = config.distributed.interface
    own = next((one for one in interfaces.values() if not one.startswith("127.")), "127.0.0.1")
    return {
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "horovod": installed("horovod"),
        "code": hash_of_code(Path(__file__).parents[1]),
        "data": hash_of_data(config.resolve(config.data.data_dir)),
        "interfaces": interfaces,
        "address": interfaces.get(wanted) if wanted else own,
    }


def check_hosts_agree(config: Config) -> None:
    """Compare what the ranks train with, before they do; every rank calls this.

    Raises:
        DistributedError: on every rank, naming a host that has something else than rank 0's.
    """
    if distributed.get_world_size() == 1:
        return
    mine = facts(config)
    kept = {what: mine[what] for what in ("host", *DECISIVE)}
    # Horovod: nothing but the shapes of gradients is compared by the ranks themselves.
    first, *others = distributed.gather_objects(kept, name="host_facts")
    for rank, other in enumerate(others, start=1):
        for what in DECISIVE:
            if other[what] != first[what]:
                raise DistributedError(
                    f"{what} of rank {rank} on {other['host']} is {other[what]}, but rank 0 on"
                    f" {first['host']} has {first[what]}:"
                    f" {cure(what, other['host'], first['host'], config)}"
                )


def cure(what: str, host: str, first: str, config: Config) -> str:
    """Return what to do about a host that differs from the first one."""
    if what == "code":
        return f"copy the project from {first} to {host}: the same commit, no local changes"
    if what == "data":
        folder = config.resolve(config.data.data_dir)
        return f"on {host}, delete {folder}: training prepares it again"
    return f"on {host}: make setup"


def installed(package: str) -> str | None:
    """Return a package's version as pip knows it, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hash_of_code(folder: Path) -> str:
    """Return a hash of every Python file of a package: names and contents."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder)}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:LETTERS]


def hash_of_data(folder: Path) -> str | None:
    """Return a hash of prepared data, or None where there are none.

    All of `metadata.json` and of the tokenizer; of the tokens, which may be many GB, their number
    and both ends.
    """
    if not (folder / "metadata.json").is_file():
        return None
    total = hashlib.sha256()
    for file in sorted(one for one in folder.iterdir() if one.suffix in (".json", ".bin")):
        size = file.stat().st_size
        total.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as content:
            if file.suffix == ".json":
                total.update(content.read())
                continue
            total.update(content.read(END_BYTES))
            content.seek(max(0, size - END_BYTES))
            total.update(content.read(END_BYTES))
    return total.hexdigest()[:LETTERS]


def addresses() -> dict[str, str]:
    """Return the IPv4 address of every network interface that is up and has one."""
    state = psutil.net_if_stats()
    return {
        name: one.address
        for name, all_of in psutil.net_if_addrs().items()
        for one in all_of
        if one.family == socket.AF_INET and name in state and state[name].isup
    }


def call_all(peers: dict[str, list[Any]]) -> dict[str, Any]:
    """Call every host at its address and port; return who answers, and why others do not."""
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
