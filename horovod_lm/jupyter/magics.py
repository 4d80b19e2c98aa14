"""`%%horovodrun -np 2`: a cell on N fresh processes; `%horovodrun -np 2 COMMAND`: a command.

    %load_ext horovod_lm.jupyter

    %%horovodrun -np 2 --push config --out losses
    import horovod.torch as hvd
    hvd.init()
    hvd.rank()

The body sees what it imports itself and what `--push` names. Each line that it prints comes back
behind its rank; rank 0's at once, the others' in order when all have ended, so that the same cell
always shows the same text. The call that is made, and what it needs: `%%horovodrun --check`.
"""

from __future__ import annotations

import argparse
import base64
import re
import shlex
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from horovod_lm.jupyter import rank_cell
from horovod_lm.jupyter.call import Call
from horovod_lm.jupyter.outcome import Outcome, RankError, is_of_a_stall
from horovod_lm.jupyter.ranks import follow
from horovod_lm.utils.errors import ConfigError

# Horovod: what its own code logs: when, how bad, where in its source; then what.
_LOGGED = re.compile(r"^\[\d{4}-[^\]]*: [A-Z] [^\]]*\] (?:\[\d+\]: )?")
# By the error at the cell's end.
_SAID_BETTER = ("Horovod background loop uncaught exception", "One or more rank (marked by")
STALL_SECONDS = 20  # that a cell's ranks wait for one that does not come
NOTE = "note: the ranks of a cell share this machine's cores evenly; --threads N gives each N"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a magic's line in a sentence, and does not end the kernel."""

    def error(self, message: str) -> None:
        raise ConfigError(f"%horovodrun: {message} (%horovodrun --help lists the options)")


def build_parser() -> argparse.ArgumentParser:
    """Describe the magic's line."""
    parser = _Parser(prog="%%horovodrun", description=__doc__.split("\n")[0], add_help=False,
                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this")
    add("-np", "--num-proc", dest="np", type=int, metavar="N", help="how many ranks (default: 2)")
    add("-H", "--hosts", metavar="HOST:N,...", help="on which hosts (default: this one)")
    add("--hostfile", metavar="FILE", help="the same from a file: a line `host slots=N` for each")
    add("--elastic", metavar="FILE",
        help="ranks may die and join: follow this file of hosts while it changes; it is written"
        " with N places on this host where it is not there")  # fmt: skip
    add("--min-np", type=int, default=1, metavar="N", help="elastic: end with fewer ranks")
    add("--max-np", type=int, metavar="N", help="elastic: never start more")
    add("--ssh-port", type=int, metavar="N", help="of the other hosts")
    add("--ssh-identity-file", metavar="FILE", help="the private key for the other hosts")
    add("--network-interface", metavar="NAME", help="that the hosts share, for example eth0")
    add("--timeout", type=float, default=0.0, metavar="SECONDS",
        help="end every rank after so long, and say where each was (default: never)")  # fmt: skip
    add("--stall", type=int, metavar="SECONDS",
        help="end the job when ranks have waited for another so long; warned of before (0: never;"
        f" default: {STALL_SECONDS} for a cell, what a command itself sets)")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME=VALUE",
        help="an environment variable of every rank (repeatable)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="CPU threads of each rank (default: a fair share)")
    add("--timeline", metavar="FILE", help="record Horovod's timeline of rank 0")
    add("--fusion-threshold-mb", type=float, metavar="MB", help="tensors are joined up to so much")
    add("--cycle-time-ms", type=float, metavar="MS", help="time between two looks at what is ready")
    add("--push", default="", metavar="A,B", help="names of the notebook that the cell sees")
    add("--out", metavar="NAME", help="a list of each rank's last value, by rank")
    add("--check", action="store_true", help="say what would be run, and start nothing")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what a line (one %%) runs")
    return parser


@magics_class
class HorovodMagics(Magics):
    """The magic, for one notebook."""

    _said = False

    @no_var_expand
    @line_cell_magic
    def horovodrun(self, line: str, cell: str | None = None) -> None:
        """Run a cell, or a command, on several Horovod ranks."""
        if cell is None:
            line = self.shell.var_expand(line)
        arguments = build_parser().parse_args(shlex.split(line))
        if arguments.help:
            print(build_parser().format_help())
            return
        call = self._call(arguments, cell)
        if arguments.check:
            print(call.describe())
            return
        if arguments.threads is None and call.size > 1:
            self._say_once()
        values = self._run(call, arguments)
        if arguments.out:
            self.shell.user_ns[arguments.out] = values

    def _call(self, arguments: argparse.Namespace, cell: str | None) -> Call:
        if cell is None:
            if not arguments.command:
                raise ConfigError(
                    "%horovodrun needs a command, for example: %horovodrun -np 2 python train.py;"
                    " for code in the cell itself write %%horovodrun, with two %"
                )
            if arguments.out or arguments.push:
                raise ConfigError("--out and --push belong to a cell: write %%horovodrun")
            return Call.of_command(arguments, arguments.command)
        if arguments.command:
            raise ConfigError(
                f"%%horovodrun runs the cell's body, and {shlex.join(arguments.command)} stands on"
                " its line: write %horovodrun, with one %, to run a command"
            )
        if arguments.stall is None:
            arguments.stall = STALL_SECONDS
        pushed = pack_names(arguments.push, self.shell.user_ns)
        return Call.of_cell(arguments, checked(cell), pushed)

    def _run(self, call: Call, arguments: argparse.Namespace) -> list[Any]:
        outcome = Outcome(call.size, call.what, arguments.timeout, call.elastic)
        shown = _Output(call.size)
        with call.ready() as job:
            try:
                follow(job, outcome, shown.add)
            except KeyboardInterrupt:
                outcome.reason = "stopped"
            finally:
                shown.finish()
        error = outcome.error()
        if isinstance(error, RankError) and call.is_command:
            error.trace = ""  # a command's last words have just been shown
        if error is not None:
            raise error from None
        return [_unpack(outcome.values.get(rank)) for rank in range(call.size)]

    def _say_once(self) -> None:
        if not HorovodMagics._said:
            HorovodMagics._said = True
            print(NOTE, file=sys.stderr)


class _Output:
    """Shows what the ranks print: rank 0's lines at once, the others' by rank at the end."""

    def __init__(self, size: int) -> None:
        self._later: dict[int, list[str]] = {rank: [] for rank in range(1, size)}
        self._stalls: set[tuple[int, str]] = set()

    def add(self, event: dict) -> None:
        if event["event"] != "line":
            return
        rank, text = event["rank"], readable(event["text"])
        if is_of_a_stall(text):
            # Horovod: whether it reports once more before it gives up is a matter of chance.
            text = text.replace("!: [", ": [", 1)
            if (rank, text) in self._stalls:
                return
            self._stalls.add((rank, text))
        if not text:
            return
        if rank == 0:
            self._show(rank, text)
        elif text.endswith("\r"):  # a progress line that is written over: only its end is kept
            pass
        else:
            self._later.setdefault(rank, []).append(text)

    def finish(self) -> None:
        for rank, lines in sorted(self._later.items()):
            for text in lines:
                self._show(rank, text)
        sys.stdout.flush()

    @staticmethod
    def _show(rank: int, text: str) -> None:
        sys.stdout.write(f"[{rank}] {text}")
        if rank == 0:
            sys.stdout.flush()


def readable(line: str) -> str:
    """Return a rank's line as it is shown: Horovod's own log as "Horovod: ...", or not at all."""
    text = _LOGGED.sub("Horovod: ", line)
    return "" if any(words in text for words in _SAID_BETTER) else text


def checked(cell: str) -> str:
    """Return a cell that compiles.

    Raises:
        RankError: the cell is not Python; it shows where.
    """
    try:
        rank_cell.parse(cell)
    except SyntaxError as error:
        shown = "".join(traceback.format_exception_only(error))
        raise RankError(
            f"the cell is not Python: {error.msg} (line {error.lineno}); nothing was started",
            trace=shown,
        ) from None
    return cell


def pack_names(names: str, namespace: Mapping[str, Any]) -> str:
    """Return the values of comma-separated names as text that a rank unpacks.

    Raises:
        ConfigError: a name is not defined, or its value cannot be sent to another process.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        return ""
    missing = [name for name in wanted if name not in namespace]
    if missing:
        raise ConfigError(
            f"--push {missing[0]}: there is no such name; run the cell that defines it first"
        )
    import cloudpickle

    try:
        packed = cloudpickle.dumps({name: namespace[name] for name in wanted})
    except Exception as error:
        raise ConfigError(
            f"--push {names}: a value cannot be sent to another process ({error});"
            " make it in the cell instead"
        ) from None
    return base64.b64encode(packed).decode()


def _unpack(packed: str | None) -> Any:
    if packed is None:
        return None
    import cloudpickle

    return cloudpickle.loads(base64.b64decode(packed))
