"""How long a `%%horovodrun` cell takes to show its first line, and a cluster to be ready.

    python tests/benchmarks/cell_start.py [--pairs 15]

Each against plain horovodrun, in turns, so that whatever else the machine does meets all of them:
the medians, and the median ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

from horovod_lm.jupyter.live.cluster import HorovodCluster

HOROVODRUN = Path(sys.executable).with_name("horovodrun")


def plain() -> float:
    """Seconds until `horovodrun -np 2 python -c "print(1)"` shows its first line."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [HOROVODRUN, "-np", "2", sys.executable, "-c", "print(1)"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process.stdout.readline()
    seconds = time.perf_counter() - started
    process.communicate()
    return seconds


class FirstLine:
    """A standard output that notes when something is written to it first."""

    def __init__(self) -> None:
        self.at: float | None = None

    def write(self, text: str) -> None:
        self.at = self.at or time.perf_counter()

    def flush(self) -> None:
        """Nothing is held back."""


def cell(shell: InteractiveShell) -> float:
    """Seconds until a cell with `print(1)` shows its first line."""
    before, sys.stdout = sys.stdout, FirstLine()
    started = time.perf_counter()
    try:
        shell.run_cell("%%horovodrun -np 2\nprint(1)")
        return sys.stdout.at - started
    finally:
        sys.stdout = before


def cluster() -> float:
    """Seconds until two live ranks are ready for their first cell."""
    started = time.perf_counter()
    with HorovodCluster(n=2):
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "horovod_lm.jupyter")
    plain(), cell(shell), cluster()
    times = [(plain(), cell(shell), cluster()) for _ in range(pairs)]
    for name, column in zip(("plain", "cell", "cluster"), zip(*times, strict=True), strict=True):
        ratio = statistics.median(own / row[0] for own, row in zip(column, times, strict=True))
        print(f"{name:8}{statistics.median(column):6.2f} s, {ratio:5.2f} times plain horovodrun")


if __name__ == "__main__":
    main()
