"""`%%horovodrun` runs a cell on fresh ranks, `%horovodrun` a command; `%%px` a cell on live ranks.

    %load_ext horovod_lm.jupyter

    %%horovodrun -np 2 --push config --out losses
    import horovod.torch as hvd
    hvd.init()
    hvd.rank()

The body sees what it imports itself and what `--push` names. Each line that it prints is shown
behind its rank: rank 0's at once, the others' in order when all ranks have ended, so that the same
cell always shows the same text.

    %%px                       every live rank of a HorovodCluster
    %%px --rank 1              one alone: let it call no collective that the others do not call
    %%px --out sizes           a list of each rank's last value, by rank
"""

from __future__ import annotations

import argparse
import pickle
import queue
import shlex
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.jupyter.run_cell.job import (
    COMMAND_GRACE_PERIOD,
    JobProcess,
    JobSpec,
    threads_per_rank,
)
from horovod_lm.jupyter.run_cell.job_result import JobResult, RankError, StallReports, readable
from horovod_lm.utils.errors import ConfigError, DistributedError

STALL_SECONDS = 20  # that a cell's ranks wait for one that does not come


class _Parser(argparse.ArgumentParser):
    """Raises a ConfigError where argparse would print usage and end the kernel."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} ({self.prog} --help lists the options)")


def build_horovodrun_parser() -> argparse.ArgumentParser:
    """Return the parser of `%%horovodrun`'s line."""
    parser = _Parser(
        prog="%%horovodrun", add_help=False, allow_abbrev=False,
        description="Run a cell's body (%%%%horovodrun) or a command (%%horovodrun) on several"
        " ranks of this host.",
    )  # fmt: skip
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this")
    add("-np", "--num-proc", dest="np", type=int, default=2, metavar="N",
        help="number of ranks (default: 2)")  # fmt: skip
    add("--timeout", type=float, default=0.0, metavar="SECONDS",
        help="end every rank after this time, and say where each was (default: never)")  # fmt: skip
    add("--stall", type=int, metavar="SECONDS",
        help="end the job when ranks have waited for another one for this time, with a warning"
        f" before (0: never; default: {STALL_SECONDS} for a cell; a command sets it itself)",
        )  # fmt: skip
    add("--threads", type=int, metavar="N",
        help="CPU threads of each rank (default: an equal share)")  # fmt: skip
    add("--timeline", metavar="FILE", help="record Horovod's timeline of rank 0")
    add("--push", default="", metavar="A,B", help="variables of the notebook that the cell sees")
    add("--out", metavar="NAME", help="a list of each rank's last value, by rank")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what %%horovodrun runs")
    return parser


def build_px_parser() -> argparse.ArgumentParser:
    """Return the parser of `%%px`'s line."""
    parser = _Parser(prog="%%px", add_help=False, allow_abbrev=False,
                     description="Run a cell on the live ranks of a HorovodCluster.")  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    parser.add_argument("--rank", type=int, action="append", metavar="N",
                        help="a rank that runs it (repeatable; default: all)")  # fmt: skip
    parser.add_argument("--out", metavar="NAME", help="a list of each rank's last value, by rank")
    return parser


@magics_class
class HorovodMagics(Magics):
    """The magics of one notebook."""

    shell: InteractiveShell

    @no_var_expand
    @line_cell_magic
    def horovodrun(self, line: str, cell: str | None = None) -> None:
        """Run a cell, or a command, on several Horovod ranks."""
        parser = build_horovodrun_parser()
        if cell is None:
            line = self.shell.var_expand(line)
        arguments = parser.parse_args(shlex.split(line))
        if arguments.help:
            print(parser.format_help())
            return
        _check(arguments, cell)
        if cell is None:
            self._run_command(arguments)
        else:
            values = self._run_cell(arguments, cell)
            if arguments.out:
                self.shell.user_ns[arguments.out] = values

    def _run_cell(self, arguments: argparse.Namespace, cell: str) -> list[Any]:
        source = checked(cell)
        pushed = pickle_variables(arguments.push, self.shell.user_ns)
        if arguments.stall is None:
            arguments.stall = STALL_SECONDS
        with tempfile.TemporaryDirectory(prefix="horovodrun-") as name:
            folder = Path(name)
            rank_cell.write_cell(folder, source, pushed, bool(arguments.out))
            spec = _spec(arguments, [sys.executable, "-m", rank_cell.__name__])
            spec.cell_folder = folder
            error = _run(spec).error()
            if error is not None:
                raise error from None
            values = rank_cell.read_reports(folder, "value")
        return [pickle.loads(values[rank]) if rank in values else None for rank in range(spec.size)]

    def _run_command(self, arguments: argparse.Namespace) -> None:
        command = list(arguments.command)
        if command[0] in ("python", "python3"):
            command[0] = sys.executable  # the kernel's, whatever is on PATH
        spec = _spec(arguments, command)
        spec.what = " ".join(command[1:3]) if command[0] == sys.executable else command[0]
        spec.grace_period = COMMAND_GRACE_PERIOD
        error = _run(spec).error()
        if isinstance(error, RankError):
            error.trace = ""  # the last lines of its output were shown already
        if error is not None:
            raise error from None

    @no_var_expand
    @line_cell_magic
    def px(self, line: str, cell: str | None = None) -> None:
        """Run a cell, or a line, on the live ranks of a HorovodCluster."""
        from horovod_lm.jupyter.live.cluster import HorovodCluster

        parser = build_px_parser()
        arguments = parser.parse_args(shlex.split(line) if cell is not None else [])
        if arguments.help:
            print(parser.format_help())
            return
        cluster = HorovodCluster.current
        if cluster is None:
            raise DistributedError("no cluster is running: HorovodCluster(n=2).start() starts one")
        source = checked(self.shell.transform_cell(line if cell is None else cell))
        if arguments.out:
            self.shell.user_ns[arguments.out] = cluster.run(source, only=arguments.rank)
        else:
            cluster.run_cell(source, only=arguments.rank)


def _check(arguments: argparse.Namespace, cell: str | None) -> None:
    if arguments.np < 1:
        raise ConfigError(f"-np {arguments.np}: there must be at least one rank")
    if cell is None and not arguments.command:
        raise ConfigError(
            "%horovodrun needs a command, for example: %horovodrun -np 2 python train.py;"
            " for code in the cell itself write %%horovodrun, with two %"
        )
    if cell is None and (arguments.out or arguments.push):
        raise ConfigError("--out and --push need a cell: write %%horovodrun, with two %")
    if cell is not None and arguments.command:
        raise ConfigError(
            f"%%horovodrun runs the cell's body, but its line has {shlex.join(arguments.command)}:"
            " write %horovodrun, with one %, to run a command"
        )


def _spec(arguments: argparse.Namespace, command: Sequence[str]) -> JobSpec:
    call = ["horovodrun", "-np", str(arguments.np)]
    if arguments.timeline:
        call += ["--timeline-filename", arguments.timeline]
    env = {} if arguments.stall is None else _stall_settings(arguments.stall)
    threads = threads_per_rank(arguments.np, arguments.threads, "--threads N")
    env["OMP_NUM_THREADS"] = str(threads)
    return JobSpec(arguments.np, [*call, *command], env, timeout=arguments.timeout)


def _stall_settings(seconds: int) -> dict[str, str]:
    # Horovod: it looks once in each warning period, so only a period that divides the limit works.
    periods = [each for each in (5, 4, 3, 2, 1) if seconds % each == 0]
    return {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(periods[0] if seconds else 60),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(seconds),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(max(30, 2 * seconds)),
    }


def _run(spec: JobSpec) -> JobResult:
    """Run a job to its end, and show what it prints; an interrupt stops every rank."""
    events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    job, shown, interrupted = JobProcess(spec, events.put), _Output(), False
    try:
        while True:
            try:
                event = events.get()
                if event["event"] == "closed":
                    break
                shown.add(event)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                job.terminate()
    finally:
        result = job.stop()  # nothing is left to stop, unless an error has ended the loop
        shown.finish()
    if interrupted:
        result.reason = "stopped"
    return result


class _Output:
    """Shows what the ranks print: rank 0's lines at once, the others' by rank at the end."""

    def __init__(self) -> None:
        self._later: dict[int, list[str]] = defaultdict(list)
        self._reports: dict[int, StallReports] = defaultdict(StallReports)
        self._reported: set[tuple[int, str]] = set()

    def add(self, event: dict[str, Any]) -> None:
        rank = event.get("rank")
        if event["event"] != "output" or rank is None:
            return
        text = readable(event["text"])
        if self._reports[rank].includes(text):
            # Horovod: whether it reports once more before it gives up is a matter of chance.
            text = text.replace("!: [", ": [", 1)
            if (rank, text) in self._reported:
                return
            self._reported.add((rank, text))
        if not text:
            return
        if rank == 0:
            self._show(rank, text)
        elif not text.endswith("\r"):  # of progress that is written over only the end is kept
            self._later[rank].append(text)

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


def checked(cell: str) -> str:
    """Return a cell that compiles.

    Raises:
        RankError: the cell is not Python; the text says where.
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


def pickle_variables(names: str, namespace: Mapping[str, Any]) -> bytes:
    """Return a pickled dictionary of the variables with comma-separated names.

    Raises:
        ConfigError: a name is not defined, or its value cannot be pickled.
    """
    import cloudpickle

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    missing = [name for name in wanted if name not in namespace]
    if missing:
        raise ConfigError(
            f"--push {missing[0]}: there is no such name; run the cell that defines it first"
        )
    try:
        return cloudpickle.dumps({name: namespace[name] for name in wanted})
    except Exception as error:
        raise ConfigError(
            f"--push {names}: a value cannot be sent to another process ({error});"
            " make it in the cell instead"
        ) from None
