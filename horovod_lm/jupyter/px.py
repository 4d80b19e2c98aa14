"""`%%px`: a cell on every live rank, shown rank by rank, so that it always shows the same text.

    %%px                       every rank
    %%px --rank 1              one alone: let it call no collective that the others do not call
    %%px --out sizes           a list of each rank's last value, by rank

It takes the place of ipyparallel's own, which leaves the other ranks waiting when one fails.
"""

from __future__ import annotations

import argparse
import shlex

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from horovod_lm.jupyter.cluster import HorovodCluster
from horovod_lm.jupyter.magics import checked
from horovod_lm.utils.errors import ConfigError, DistributedError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"%%px: {message} (its options are --rank and --out)")


def build_parser() -> argparse.ArgumentParser:
    """Describe the magic's line."""
    parser = _Parser(prog="%%px", add_help=False, allow_abbrev=False)
    parser.add_argument("--rank", type=int, action="append", metavar="N")
    parser.add_argument("--out", metavar="NAME")
    return parser


@magics_class
class PxMagics(Magics):
    """The magic, for one notebook."""

    @no_var_expand
    @line_cell_magic
    def px(self, line: str, cell: str | None = None) -> None:
        """Run a cell, or a line, on the live ranks."""
        cluster = HorovodCluster.current
        if cluster is None:
            raise DistributedError("no cluster is running: HorovodCluster(n=2).start() starts one")
        arguments = build_parser().parse_args(shlex.split(line) if cell is not None else [])
        source = checked(self.shell.transform_cell(line if cell is None else cell))
        if arguments.out:
            self.shell.user_ns[arguments.out] = cluster.run(source, only=arguments.rank)
        else:
            cluster.run_cell(source, only=arguments.rank)


def register(shell) -> None:
    """Give a notebook its `%%px`."""
    shell.register_magics(PxMagics)
