"""Execute notebooks and store them, so that executing twice gives the same bytes.

    python -m horovod_lm.teaching.notebooks FILE --in-place     # store the outputs in FILE
    python -m horovod_lm.teaching.notebooks FILE --out OTHER    # leave FILE unchanged

While a notebook runs, the terminal shows the current section and what the cells print.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from horovod_lm.launch.hosts import replace_file
from horovod_lm.utils.cli import EXIT_USER_ERROR, run_cli
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.progress import ProgressLine, format_seconds

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "name": "python"},
}
CELL_TIMEOUT = 1800  # seconds; the longest cell trains for minutes, and machines differ
GRACE_PERIOD = 5  # seconds between SIGTERM and SIGKILL
_FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError, asyncio.CancelledError)
MAY_RAISE = "raises-exception"  # the tag of a cell that shows an error on purpose
TOC_START, TOC_STOP = "<!-- toc -->", "<!-- tocstop -->"
_CONTENTS = re.compile(f"{TOC_START}.*?{TOC_STOP}", re.DOTALL)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(UserError):
    """A notebook cannot be read, or one of its cells failed."""


def execute(
    path: str | Path, out: str | Path, timeout: int = CELL_TIMEOUT, quiet: bool = False
) -> NotebookNode:
    """Execute a notebook in a new kernel and store it with its outputs.

    The kernel is this Python, whatever kernels are registered elsewhere, with this environment's
    programs first on PATH. Its working directory is the notebook's folder. An interrupt or a
    failing cell leaves no process behind and does not change the notebook at `path`.

    Args:
        path: the notebook.
        out: where to store it; may be `path`.
        timeout: seconds that a cell may take.
        quiet: do not print progress.

    Returns:
        The executed notebook.

    Raises:
        NotebookError: the notebook cannot be read or written, or a cell failed, died or took too
            long; the partly executed notebook is stored at `out`, unless that is `path`.
    """
    path, out = Path(path), Path(out)
    notebook = read_notebook(path)
    try:  # before minutes of execution
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise NotebookError(f"{out} cannot be written: {error.strerror}") from None
    progress = ProgressLine(enabled=not quiet)
    started = time.monotonic()
    try:
        asyncio.run(_Run(notebook, path, timeout, progress).execute_all())
    except NotebookError as error:
        if out.resolve() == path.resolve():
            raise
        store(notebook, out)
        raise NotebookError(f"{error}\nexecuted up to this cell: {out}") from None
    store(notebook, out)
    progress.say(f"executed in {format_seconds(time.monotonic() - started)}: {out}")
    return notebook


def read_notebook(path: Path) -> NotebookNode:
    """Return a notebook whose cells all have an id.

    Raises:
        NotebookError: the file cannot be read, is not a notebook, or a cell has no id.
    """
    try:
        content = path.read_bytes()
        notebook = nbformat.reader.reads(content.decode(json.detect_encoding(content)))
        # nbformat would add ids, but different ones at each execution.
        if not all("id" in cell for cell in notebook.cells):
            raise NotebookError(f"{path} has cells without ids: save it in format 4.5 or newer")
        nbformat.validate(notebook)
        nbformat.writes(notebook).encode()  # JSON can hold text that UTF-8 cannot
    except OSError as error:
        raise NotebookError(f"{path} cannot be read: {error.strerror}") from None
    except (nbformat.ValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise NotebookError(f"{path} is not a notebook: {reason}") from None
    except (AttributeError, TypeError, LookupError, RecursionError):
        raise NotebookError(f"{path} is not a notebook of format 4.5 or newer") from None
    return notebook


def store(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook atomically, without what differs between executions.

    Raises:
        ConfigError: the file cannot be written.
    """
    normalize(notebook)
    renew_table_of_contents(notebook)
    replace_file(path, nbformat.writes(notebook) + "\n")


def for_each(files: Sequence[Path], act: Callable[[Path], object]) -> int:
    """Call `act` with each file, also after an error; return the exit code of the command."""
    code = 0
    for file in files:
        try:
            act(file)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = EXIT_USER_ERROR
    return code


def normalize(notebook: NotebookNode) -> None:
    """Remove times, widget states, and what depends on the kernel or the terminal."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                # A command after `!` runs on a terminal, whose lines end with a carriage return.
                output.text = re.sub(r"\r+\n", "\n", output.text)
            else:
                # Without a kernel a widget is shown as an error; its picture or text stays.
                output.get("data", {}).pop(WIDGET_VIEW, None)


def headings(notebook: NotebookNode) -> list[tuple[int, int, str]]:
    """Return every heading as (index of its cell, level from 1, text)."""
    return [
        (index, len(marks), text)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown"
        for marks, text in _HEADING.findall(_FENCED.sub("", cell.source))
    ]


def table_of_contents(notebook: NotebookNode) -> str:
    """Return a list of links to every heading below the title."""
    lines = []
    for index, level, text in headings(notebook):
        # Not to the heading above the list itself.
        if level > 1 and TOC_START not in notebook.cells[index].source:
            # A heading's link in Jupyter is its text as shown, with dashes for spaces.
            link = re.sub("[`*]", "", text).replace(" ", "-")
            lines.append(f"{'  ' * (level - 2)}- [{text}](#{link})")
    return "\n".join(lines)


def renew_table_of_contents(notebook: NotebookNode) -> None:
    """Write the table of contents between its two marks, in the cells that have them."""
    contents = f"{TOC_START}\n{table_of_contents(notebook)}\n{TOC_STOP}"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _CONTENTS.sub(lambda _: contents, cell.source)


class _Run(NotebookClient):
    """One execution: shows progress, and ends every process that the cells started."""

    def __init__(
        self, notebook: NotebookNode, path: Path, timeout: int, progress: ProgressLine
    ) -> None:
        # Without folders to search, the manager knows only the kernel of this Python.
        this_python = KernelSpecManager(kernel_dirs=[])
        super().__init__(
            notebook,
            km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=this_python),
            timeout=timeout,
            resources={"metadata": {"path": str(path.parent.resolve())}},
            # The kernel's warnings are about its unencrypted local socket.
            extra_arguments=["--log-level=ERROR"],
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            on_notebook_start=self._handle_signals,
            on_cell_execute=self._show_section,
            on_cell_executed=self._flush_line,
        )
        self._path, self._progress = path, progress
        self._headings = headings(notebook)
        self._code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        self._section = self._unfinished = ""
        self._started = time.monotonic()
        self._interrupted = False

    async def execute_all(self) -> None:
        """Execute the notebook. Raises NotebookError or KeyboardInterrupt if it does not finish."""
        self._task = asyncio.current_task()
        self._progress.say(f"{self._path}: {len(self._code_cells)} code cells")
        for cell in self._code_cells:
            cell.outputs, cell.execution_count = [], None
        programs = str(Path(sys.executable).parent)
        env = os.environ | {
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger warns on stderr
        }
        try:
            await self.async_execute(env=env)
        except _FAILURES as error:
            if self._interrupted:  # nbclient may call a cancelled task a dead kernel
                raise KeyboardInterrupt from None
            raise NotebookError(self._explain(error)) from None
        finally:
            await self._end_process_tree()

    # ---- progress -------------------------------------------------------------------------------

    def _show_section(self, cell: NotebookNode, cell_index: int) -> None:
        """Show the heading above a code cell where a section begins."""
        if cell.cell_type != "code":
            return
        self._cell = cell
        above = [text for index, _, text in self._headings if index < cell_index]
        section = above[-1] if above else self._path.stem
        if section != self._section:
            self._section = section
            elapsed = format_seconds(time.monotonic() - self._started)
            self._progress.say(f"\n[{elapsed}] {section}")

    def process_message(
        self, msg: dict, cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        """Print each line of a cell's output as soon as it is complete."""
        if msg["msg_type"] == "stream":
            *lines, self._unfinished = (self._unfinished + msg["content"]["text"]).split("\n")
            for line in lines:
                self._progress.say(f"  {line.rstrip()}")
        return super().process_message(msg, cell, cell_index)

    def _flush_line(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        if self._unfinished:
            self._progress.say(f"  {self._unfinished.rstrip()}")
        self._unfinished = ""

    def _explain(self, error: BaseException) -> str:
        """Return which cell failed, with its source, and why."""
        if isinstance(error, CellTimeoutError):
            reason = f"the cell took longer than {self.timeout} s"
        elif isinstance(error, CellExecutionError):
            reason = _TERMINAL_CODES.sub("", f"{error.ename}: {error.evalue}")
        else:
            reason = "the kernel died (out of memory, or killed)"
        source = "".join(f"    {line}\n" for line in self._cell.source.splitlines())
        place = f"cell {self._code_cells.index(self._cell) + 1} of {len(self._code_cells)}"
        return f"{self._path}, {place}, under {self._section!r}:\n{source}{reason}"

    # ---- the end --------------------------------------------------------------------------------

    def _handle_signals(self, notebook: NotebookNode) -> None:
        """Let SIGINT and SIGTERM cancel the run; nbclient would end the kernel alone."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)

    def _interrupt(self) -> None:
        self._interrupted = True
        if self._task is not None:
            self._task.cancel()

    async def _end_process_tree(self) -> None:
        """End the kernel and every process that its cells started."""
        manager: Any = self.km
        if manager is None or not manager.has_kernel:
            return
        try:
            tree = psutil.Process(manager.provisioner.pid).children(recursive=True)
        except psutil.NoSuchProcess:  # the kernel died, and its children have another parent
            tree = []
        if self.kc is not None:
            self.kc.stop_channels()
        await manager.shutdown_kernel(now=True)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()  # horovodrun then ends its ranks
        for process in psutil.wait_procs(tree, timeout=GRACE_PERIOD)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.teaching.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--in-place", action="store_true", help="store the outputs in FILE")
    target.add_argument("--out", type=Path, metavar="OTHER", help="store the executed FILE here")
    arguments = parser.parse_args(argv)
    if arguments.out and len(arguments.files) > 1:
        parser.error("--out takes one FILE: use --in-place for several")
    return for_each(arguments.files, lambda file: execute(file, arguments.out or file))


if __name__ == "__main__":
    run_cli(main)
