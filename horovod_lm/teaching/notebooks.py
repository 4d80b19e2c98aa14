"""Execute notebooks and store them, so that executing twice gives the same bytes; and check them.

    python -m horovod_lm.teaching.notebooks execute FILE --in-place     # run it, store its outputs
    python -m horovod_lm.teaching.notebooks execute FILE --out OTHER    # run it, leave FILE alone
    python -m horovod_lm.teaching.notebooks check FILE ...              # is what is stored whole?

While a notebook runs, the terminal shows which part it has come to and what its cells print.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from horovod_lm.teaching.notebook_checks import find_problems, headings, renew_table_of_contents
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.progress import ProgressLine, format_seconds

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_TIMEOUT = 1800  # seconds; the longest cell trains for minutes, and machines differ
PATIENCE = 5  # seconds that processes have to end by themselves
_WHAT_ENDS_A_RUN = (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
    asyncio.CancelledError,
)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(UserError):
    """A notebook cannot be read, or one of its cells failed."""


def execute(
    path: str | Path,
    out: str | Path,
    timeout: int = CELL_TIMEOUT,
    progress: ProgressLine | None = None,
) -> NotebookNode:
    """Run every cell of a notebook in a fresh kernel and store it with its outputs.

    The kernel is the Python that runs this, whatever kernels are registered elsewhere, and its
    commands come first on the PATH. Its working directory is the notebook's folder. Interrupted or
    failing, it leaves no process behind, and the notebook on the disk as it was.

    Args:
        path: the notebook.
        out: where to store it; may be `path` itself.
        timeout: seconds that a single cell may take.
        progress: where to show what happens; the standard output if None.

    Returns:
        The executed notebook.

    Raises:
        NotebookError: the notebook cannot be read, or a cell failed, died or took too long. What
            was executed up to there is at `out`, unless that is `path`.
    """
    path, out = Path(path), Path(out)
    notebook = read_notebook(path)
    progress = progress or ProgressLine()
    progress.say(f"{path}: {_count(notebook)} cells of code")
    started = time.monotonic()
    try:
        asyncio.run(_Run(notebook, path, timeout, progress).to_its_end())
    except NotebookError as error:
        if out.resolve() == path.resolve():
            raise
        store(notebook, out)
        raise NotebookError(f"{error}\nexecuted up to there: {out}") from None
    store(notebook, out)
    progress.say(f"executed in {format_seconds(time.monotonic() - started)}: {out}")
    return notebook


def read_notebook(path: Path) -> NotebookNode:
    """Return a notebook whose cells all have an id of their own.

    Raises:
        NotebookError: there is none, it is damaged, or a cell's id is missing.
    """
    try:
        content = path.read_text(encoding="utf-8")
        notebook = nbformat.reader.reads(content)
        # nbformat would give them ids, but others at each execution.
        if not all("id" in cell for cell in notebook.cells):
            raise NotebookError(f"{path} has cells without ids: save it as format 4.5 or newer")
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookError(f"{path} cannot be read: {error.strerror}") from None
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise NotebookError(f"{path} is not a notebook: {reason}") from None
    return notebook


def store(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook without what differs from one execution to the next, whole or not at all."""
    tidy(notebook)
    renew_table_of_contents(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    temporary.replace(path)


def tidy(notebook: NotebookNode) -> None:
    """Take out times, widget states, and how the machine's kernel and terminal happen to be."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"file_extension": ".py", "name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in sorted(cell.metadata) if key != "execution"}
        )
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                # A command after `!` runs on a terminal, whose lines end with a carriage return.
                output.text = re.sub(r"\r+\n", "\n", output.text)
            else:
                # A widget without its kernel is an error to readers; its picture or words stay.
                output.get("data", {}).pop(WIDGET_VIEW, None)


class _Run(NotebookClient):
    """One execution: shows where it is, passes on what cells print, ends whatever it started."""

    def __init__(
        self, notebook: NotebookNode, path: Path, timeout: int, progress: ProgressLine
    ) -> None:
        super().__init__(
            notebook,
            km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_ThisPython()),
            timeout=timeout,
            resources={"metadata": {"path": str(path.parent.resolve())}},
            # Below errors, a kernel only says that it talks over an unencrypted local socket.
            extra_arguments=["--log-level=ERROR"],
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            on_notebook_start=self._listen_to_signals,
            on_cell_execute=self._show_where,
            on_cell_executed=self._finish_line,
        )
        self._path, self._progress = path, progress
        self._parts = headings(notebook)
        self._part = self._unfinished = ""
        self._started = time.monotonic()
        self._stop_asked = False

    async def to_its_end(self) -> None:
        """Execute the notebook; raise NotebookError or KeyboardInterrupt where it does not end."""
        self._task = asyncio.current_task()
        for cell in self.nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        try:
            await self.async_execute(env=_environment())
        except _WHAT_ENDS_A_RUN as error:
            if self._stop_asked:
                raise KeyboardInterrupt from None
            raise NotebookError(self._explain(error)) from None
        finally:
            await self._end_family()

    # ---- what is shown --------------------------------------------------------------------------

    def _show_where(self, cell: NotebookNode, cell_index: int) -> None:
        """Print the heading that a cell of code stands under, where it is another one."""
        if cell.cell_type != "code":
            return
        self._cell, self._cell_index = cell, cell_index
        above = [text for index, _, text in self._parts if index < cell_index]
        part = above[-1] if above else self._path.stem
        elapsed = format_seconds(time.monotonic() - self._started)
        if part != self._part:
            self._part = part
            self._progress.say(f"\n[{elapsed}] {part}")
        self._progress.update(f"[{elapsed}] {_place(self.nb, cell_index)}", keep=False)

    def process_message(
        self, msg: dict, cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        """Pass on what a cell prints as soon as a line of it is whole."""
        if msg["msg_type"] == "stream":
            *lines, self._unfinished = (self._unfinished + msg["content"]["text"]).split("\n")
            for line in lines:
                self._progress.say(f"  {line.rstrip()}")
        return super().process_message(msg, cell, cell_index)

    def _finish_line(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        if self._unfinished:
            self._progress.say(f"  {self._unfinished.rstrip()}")
        self._unfinished = ""

    def _explain(self, error: BaseException) -> str:
        """Say which cell failed, with its code, and why."""
        where = f"{self._path}, {_place(self.nb, self._cell_index)}, under {self._part!r}"
        if isinstance(error, CellTimeoutError):
            why = f"it took longer than {self.timeout} s"
        elif isinstance(error, CellExecutionError):
            why = _TERMINAL_CODES.sub("", f"{error.ename}: {error.evalue}")
        else:
            why = "its kernel died (out of memory, or killed)"
        source = "".join(f"    {line}\n" for line in self._cell.source.splitlines())
        return f"{where}:\n{source}{why}"

    # ---- ends -----------------------------------------------------------------------------------

    def _listen_to_signals(self, notebook: NotebookNode) -> None:
        """Let Ctrl-C and SIGTERM end the run; nbclient's handlers leave the cells' processes."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        self._stop_asked = True
        if self._task is not None:
            self._task.cancel()

    async def _end_family(self) -> None:
        """End the kernel and every process that its cells have started and that still runs."""
        manager: Any = self.km
        if manager is None or not manager.has_kernel:
            return
        try:
            family = psutil.Process(manager.provisioner.pid).children(recursive=True)
        except psutil.NoSuchProcess:  # it died; nobody can say any more which were its children
            family = []
        if self.kc is not None:
            self.kc.stop_channels()
        await manager.shutdown_kernel(now=True)
        for process in family:
            _quietly(process.terminate)  # horovodrun ends its ranks when it is asked to end
        _, alive = psutil.wait_procs(family, timeout=PATIENCE)
        for process in alive:
            _quietly(process.kill)


class _ThisPython(KernelSpecManager):
    """Knows one kernel: the Python that runs this."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


def _environment() -> dict[str, str]:
    """Return the kernel's environment: this Python's commands, such as horovodrun, come first."""
    commands = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([commands, os.environ.get("PATH", "")]),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def _quietly(end: Callable[[], None]) -> None:
    try:
        end()
    except psutil.NoSuchProcess:
        pass


def _count(notebook: NotebookNode) -> int:
    return sum(cell.cell_type == "code" for cell in notebook.cells)


def _place(notebook: NotebookNode, cell_index: int) -> str:
    before = sum(cell.cell_type == "code" for cell in notebook.cells[: cell_index + 1])
    return f"cell {before} of {_count(notebook)}"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.teaching.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("execute", help="run notebooks and store their outputs")
    running.add_argument("files", nargs="+", type=Path, metavar="FILE")
    where = running.add_mutually_exclusive_group(required=True)
    where.add_argument("--in-place", action="store_true", help="store the outputs in FILE itself")
    where.add_argument("--out", type=Path, metavar="OTHER", help="store the executed notebook here")
    running.add_argument(
        "--timeout", type=int, default=CELL_TIMEOUT, metavar="SECONDS",
        help="end a cell that takes longer (default: %(default)s)",
    )  # fmt: skip
    checking = commands.add_parser("check", help="say what is wrong with stored notebooks")
    checking.add_argument("files", nargs="+", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "execute":
        if arguments.out and len(arguments.files) > 1:
            raise NotebookError("--out takes one notebook: use --in-place for several")
        for file in arguments.files:
            execute(file, arguments.out or file, arguments.timeout)
        return 0
    problems = [
        f"{file}: {problem}"
        for file in arguments.files
        for problem in find_problems(read_notebook(file))
    ]
    print("\n".join(problems) or "every cell is executed, and nothing is wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
