"""Time until a `%%horovodrun` cell prints its first line, and until a cluster is ready.

    python tests/benchmarks/cell_start.py [--pairs 15]

Compared with plain horovodrun, in turns, so that other load affects all of them; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import time
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

from horovod_lm.jupyter.live.cluster import HorovodCluster

HOROVODRUN = Path(sys.executable).with_name("horovodrun")


def plain() -> float:
    """Return the seconds until `horovodrun -np 2 python -c "print(1)"` prints its first line."""
    started = time.perf_counter()
    command = [HOROVODRUN, "-np", "2", sys.executable, "-c", "print(1)"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        seconds = time.perf_counter() - started
        process.communicate()
    return seconds


class FirstWrite(io.StringIO):
    """A standard output that notes the time of the first write."""

    at: float | None = None

    def write(self, text: str) -> int:
        self.at = self.at or time.perf_counter()
        return len(text)


def cell(shell: InteractiveShell) -> float:
    """Return the seconds until a cell with `print(1)` prints its first line."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(FirstWrite()) as output:
        shell.run_cell("%%horovodrun -np 2\nprint(1)")
    return output.at - started


def cluster() -> float:
    """Return the seconds until two live ranks are ready for their first cell."""
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
