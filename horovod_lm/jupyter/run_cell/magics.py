"""`%%horovodrun` runs a cell on new ranks; `%%px` runs a cell on live ranks.

    %load_ext horovod_lm.jupyter

    %%horovodrun -np 2 --push config --out losses
    import horovod.torch as hvd
    hvd.init()
    hvd.rank()

The body sees what it imports itself and the variables that `--push` names. Each line that it prints
is shown after its rank: rank 0's at once, those of the others in order when all ranks have ended,
so that the same cell always shows the same text.

    %%px                       every live rank of a HorovodCluster
    %%px --out sizes           a list of each rank's last value, by rank

`%%horovodrun?` and `%%px?` list the options.
"""

from __future__ import annotations

import argparse
import queue
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.jupyter.run_cell.horovodrun_job import (
    JobProcess,
    JobSpec,
    stall_settings,
    threads_per_rank,
)
from horovod_lm.jupyter.run_cell.job_result import JobResult, RankError, StallReports, readable
from horovod_lm.utils.errors import ConfigError, DistributedError


@magics_class
class HorovodMagics(Magics):
    """The magics of one notebook."""

    shell: InteractiveShell

    # fmt: off
    @no_var_expand
    @cell_magic
    @magic_arguments()
    @argument("-np", "--num-proc", dest="np", type=int, default=2, metavar="N",
              help="number of ranks (default: 2)")
    @argument("--stall", type=int, default=20, metavar="SECONDS",
              help="end the cell when ranks have waited for another one for this time, with a"
              " warning before (0: never; default: 20)")
    @argument("--threads", type=int, metavar="N",
              help="CPU threads of each rank (default: an equal share)")
    @argument("--timeline", metavar="FILE", help="record Horovod's timeline of rank 0")
    @argument("--push", default="", metavar="A,B",
              help="variables of the notebook that the cell sees")
    @argument("--out", metavar="NAME", help="a list of each rank's last value, by rank")
    # fmt: on
    def horovodrun(self, line: str, cell: str) -> None:
        """Run a cell on new ranks of this host."""
        arguments = _parse(self.horovodrun, line)
        _check(arguments)
        _check_syntax(cell)
        pushed = self._pickle_variables(arguments.push)
        spec = _spec(arguments)
        try:
            with tempfile.TemporaryDirectory(prefix="horovodrun-") as folder:
                spec.cell_folder = Path(folder)
                rank_cell.write_cell(spec.cell_folder, cell, pushed, bool(arguments.out))
                result = _run(spec)
        except OSError as failure:  # for example a full disk
            raise DistributedError(f"the cell cannot be given to the ranks: {failure}") from None
        if error := result.error():
            raise error from None
        if arguments.out:
            self.shell.user_ns[arguments.out] = result.load_values()

    def _pickle_variables(self, names: str) -> bytes:
        """Return a pickled dictionary of the notebook's variables with comma-separated names."""
        import cloudpickle

        wanted = [name.strip() for name in names.split(",") if name.strip()]
        missing = [name for name in wanted if name not in self.shell.user_ns]
        if missing:
            raise ConfigError(
                f"--push {missing[0]}: there is no such name; run the cell that defines it first"
            )
        try:
            return cloudpickle.dumps({name: self.shell.user_ns[name] for name in wanted})
        except Exception as error:
            raise ConfigError(
                f"--push {names}: a value cannot be sent to another process ({error});"
                " make it in the cell instead"
            ) from None

    # fmt: off
    @no_var_expand
    @cell_magic
    @magic_arguments()
    @argument("--out", metavar="NAME", help="a list of each rank's last value, by rank")
    # fmt: on
    def px(self, line: str, cell: str) -> None:
        """Run a cell on the live ranks of a HorovodCluster."""
        from horovod_lm.jupyter.live.cluster import HorovodCluster

        arguments = _parse(self.px, line)
        cluster = HorovodCluster.current
        if cluster is None:
            raise DistributedError("no cluster is running: HorovodCluster(n=2).start() starts one")
        _check_syntax(cell)
        if arguments.out:
            self.shell.user_ns[arguments.out] = cluster.run(cell)
        else:
            cluster.run_cell(cell)


def _parse(magic: Any, line: str) -> argparse.Namespace:
    try:
        words = shlex.split(line)  # without quotes, which IPython's `parse_argstring` keeps
    except ValueError as error:
        raise UsageError(f"{error}: {line}") from None
    arguments = magic.parser.parse_args(words)
    if arguments.out and not arguments.out.isidentifier():
        raise ConfigError(f"--out {arguments.out!r}: it must be the name of a variable")
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    for option, value, least in (
        ("-np", arguments.np, 1),
        ("--stall", arguments.stall, 0),
        ("--threads", arguments.threads, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{option} {value}: it must be at least {least}")


def _spec(arguments: argparse.Namespace) -> JobSpec:
    call = ["horovodrun", "-np", str(arguments.np)]
    if arguments.timeline:
        call += ["--timeline-filename", arguments.timeline]
    env = {
        "OMP_NUM_THREADS": str(threads_per_rank(arguments.np, arguments.threads)),
        **stall_settings(arguments.stall, max(30, 2 * arguments.stall), longest_period=5),
    }
    return JobSpec(arguments.np, [*call, sys.executable, "-m", rank_cell.__name__], env)


def _run(spec: JobSpec) -> JobResult:
    """Run a cell to its end and show its output; an interrupt stops every rank."""
    events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    job, first, interrupted = JobProcess(spec, events.put), _RankOutput(0), False
    try:
        while True:
            try:
                event = events.get()
                if event["event"] == "ended":
                    break
                if event["event"] == "output" and event["rank"] == 0:
                    first.show(event["text"])
                    sys.stdout.flush()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                job.terminate()
    finally:
        result = job.stop()  # nothing is left to stop, unless an error has ended the loop
        for rank in sorted(result.printed.keys() - {0}):
            other = _RankOutput(rank)
            for line in result.printed[rank]:
                if not line.endswith("\r"):  # a line of progress is overwritten by the next one
                    other.show(line)
        sys.stdout.flush()
    result.was_stopped = interrupted
    return result


class _RankOutput:
    """Shows the lines of a rank; of equal reports of Horovod's stall check, only the first."""

    def __init__(self, rank: int) -> None:
        self._rank, self._reports = rank, StallReports()
        self._reported: set[str] = set()

    def show(self, line: str) -> None:
        text = readable(line)
        if self._reports.includes(text):
            # Horovod: whether it reports once more before it gives up is a matter of chance.
            text = text.replace("!: [", ": [", 1)
            if text in self._reported:
                return
            self._reported.add(text)
        if text:
            sys.stdout.write(f"[{self._rank}] {text}")


def _check_syntax(cell: str) -> None:
    """Raise a RankError that says where a cell is not Python."""
    try:
        rank_cell.parse(cell)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        reason = getattr(error, "msg", "") or str(error) or "it is nested too deeply"
        raise RankError(
            f"the cell is not Python: {reason}{f' (line {line})' if line else ''};"
            " nothing was started",
            trace="".join(traceback.format_exception_only(error)),
        ) from None
