"""The time of an allreduce against the size of its message, over links of three rates.

    python tests/benchmarks/allreduce_over_links.py --csv tests/benchmarks/allreduce_over_links.csv

Hosts of network namespaces, one rank each; every host's link is shaped to the rate in both
directions. Each row is one size: the fastest of several allreduces, since whatever else the machine
does can only add to a link's time, and what the ring's formula says, 2(N-1)/N x bytes / rate
(horovod_lm/analysis/scaling.py). Needs Linux and root; a few minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

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
    """Seconds in which the ring sums `size` bytes, if nothing but the rate costs time."""
    return 2 * (workers - 1) / workers * size * 8 / (megabits * 1e6)


def measure(workers: int, megabits: int) -> list[dict[str, float]]:
    """Return one row for each size that is worth its time at this rate."""
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


def main() -> None:
    """Measure everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, help="where to keep the table")
    arguments = parser.parse_args()
    rows = []
    for workers in WORKERS:
        for megabits in RATES:
            for row in measure(workers, megabits):
                ratio = row["seconds"] / row["formula_seconds"]
                print(*(f"{value:>10}" for value in row.values()), f"{ratio:7.2f}", flush=True)
                rows.append(row)
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
