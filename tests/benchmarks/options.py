"""The options that benchmarks of several models share."""

from __future__ import annotations

import argparse
from collections.abc import Collection


def parser_of(description: str, sizes: Collection[str], rounds: int) -> argparse.ArgumentParser:
    """Return a parser that knows which models to measure, and how often.

    Args:
        description: the benchmark's docstring, of which the first line is shown.
        sizes: the models' names.
        rounds: how often by default.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", default=list(sizes), choices=list(sizes), help="default: all"
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="their median counts (default: %(default)s)"
    )
    return parser
