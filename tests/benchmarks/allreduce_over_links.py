"""The time of an allreduce over the size of its message, on links of three rates.

    python tests/benchmarks/allreduce_over_links.py > tests/benchmarks/allreduce_over_links.csv

Simulated hosts, one rank each; every link has the rate in both directions. Each row is one size:
the fastest of several allreduces, because other load can only add time, and the ring's formula,
2(N-1)/N x bytes / rate (horovod_lm/analysis/scaling.py). Needs Linux and root; a few minutes.
"""

from __future__ import annotations

import csv
import json
import sys

from horovod_lm.teaching.simulated_hosts import Hosts
from horovod_lm.utils.config import Config

RATES = (20, 100, 400)  # Mbit/s
WORKERS = (2, 3)
SIZES = tuple(2**power for power in range(14, 25, 2))  # bytes: 16 KiB to 16 MiB
SECONDS_AT_MOST = 3.0  # by the formula, for one message: longer ones teach nothing new
COLUMNS = ("workers", "megabits_per_second", "bytes", "seconds", "formula_seconds", "repeats")

ON_EACH_RANK = """
import json, sys, time
import horovod.torch as hvd, torch
hvd.init()
for size, repeats in json.loads(sys.argv[1]):
    tensor, seconds = torch.ones(size // 4), []
    for number in range(repeats + 1):
        hvd.barrier()
        started = time.perf_counter()
        hvd.allreduce_(tensor, op=hvd.Sum, name=f"{size}.{number % 2}")
        seconds.append(time.perf_counter() - started)
    if hvd.rank() == 0:
        print("MEASURED", json.dumps([size, min(seconds[1:]), repeats]))
"""


def formula(workers: int, size: int, megabits: float) -> float:
    """Return the seconds of a ring allreduce of `size` bytes if only the rate costs time."""
    return 2 * (workers - 1) / workers * size * 8 / (megabits * 1e6)


def measure(workers: int, megabits: int) -> list[dict[str, float]]:
    """Return one row for each size that does not take too long at this rate."""
    sizes = [size for size in SIZES if formula(workers, size, megabits) <= SECONDS_AT_MOST]
    plan = [(size, 11 if formula(workers, size, megabits) < 0.3 else 5) for size in sizes]
    with Hosts(workers, rate=f"{megabits}mbit") as hosts:
        command = [sys.executable, "-c", ON_EACH_RANK, json.dumps(plan)]
        done = hosts.horovodrun(Config(), command, timeout=300)
    if done.returncode:
        raise SystemExit(done.stdout)
    rows = [json.loads(line.split("MEASURED ")[1]) for line in done.stdout.splitlines()
            if "MEASURED " in line]  # fmt: skip
    return [
        dict(zip(COLUMNS, (workers, megabits, size, round(seconds, 6),
                           round(formula(workers, size, megabits), 6), repeats), strict=True))
        for size, seconds, repeats in rows
    ]  # fmt: skip


if __name__ == "__main__":
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for workers in WORKERS:
        for megabits in RATES:
            writer.writerows(measure(workers, megabits))
            sys.stdout.flush()
