"""What each rank of a `%%horovodrun` cell runs: the cell's body, its last value, its error.

The notebook writes the cell to a folder that HOROVOD_LM_CELL names, and each rank writes a report
there, so that its output is the cell's alone: `{"value": bytes}`, pickled; `{"error": {...}}`, as
`describe` returns it; or the exit code that the cell chose, `{"exit": 3}`.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import os
import pickle
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

CELL = "<cell>"  # the file name in tracebacks
VARIABLE = "HOROVOD_LM_CELL"
LOST = "HorovodInternalError"  # Horovod: raised on the ranks that survive another one
SECONDS_BEHIND_LOST = 2.0  # the rank that was lost should end first


def write_cell(folder: Path, source: str, pushed: bytes, wanted: bool) -> None:
    """Write what the ranks of a cell read to an empty folder.

    `pushed` is a pickled dictionary of the variables that the cell sees. If its last value is
    `wanted`, that goes to the notebook instead of being printed.
    """
    paths = [path for path in sys.path if path]
    (folder / "cell.pickle").write_bytes(pickle.dumps((source, pushed, wanted, paths)))


def read_reports(folder: Path | None) -> dict[int, dict[str, Any]]:
    """Return the report of each rank that has written one to a cell's folder, by rank."""
    paths = folder.glob("report.*") if folder else ()
    return {int(path.suffix[1:]): pickle.loads(path.read_bytes()) for path in paths}


def parse(source: str) -> tuple[types.CodeType, types.CodeType | None]:
    """Compile a cell's body, and the expression at its end, if there is one.

    Raises:
        SyntaxError: the cell is not Python; its line numbers are those of the notebook's cell.
    """
    # The first line of a cell is the magic, so its body begins on the second.
    tree = ast.parse("\n" + source, CELL)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        return compile(tree, CELL, "exec"), None
    del tree.body[-1]
    return compile(tree, CELL, "exec"), compile(ast.Expression(last.value), CELL, "eval")


def execute(source: str, namespace: dict[str, Any], magic: str, wanted: bool) -> Any:
    """Run a cell's body in a namespace; return the value of the expression at its end.

    If it is not `wanted`, print it if a notebook would show it, and return None. `magic` is the
    cell's first line, for tracebacks.
    """
    lines = [f"{magic}\n", *source.splitlines(keepends=True)]
    linecache.cache[CELL] = (sum(map(len, lines)), None, lines, CELL)
    body, expression = parse(source)
    exec(body, namespace)
    value = eval(expression, namespace) if expression else None
    if not wanted and value is not None and not source.rstrip().endswith(";"):
        print(repr(value))
    return value if wanted else None


def new_main_module() -> dict[str, Any]:
    """Replace `__main__` by an empty module; return its variables."""
    sys.modules["__main__"] = module = types.ModuleType("__main__", "The cells of one rank.")
    module.__dict__["__builtins__"] = builtins
    return module.__dict__


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error's name, text, line of the cell, and traceback from the cell's frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != CELL:
        trace = trace.tb_next
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(trace):
        line = frame.lineno if frame.filename == CELL else line
    try:
        text = str(error)
    except Exception:
        text = "<exception str() failed>"  # as in a traceback
    shown = traceback.TracebackException(type(error), error, trace).format()
    return {
        "name": _displayable(f"{type(error).__name__}"),
        "text": _displayable(text),
        "line": line if type(line) is int else None,
        "traceback": [_displayable(line) for line in shown],
    }


def _displayable(text: str) -> str:
    """Escape what a page cannot show, such as bytes of a file name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def pickled_value(value: Any) -> bytes:
    """Return a cell's last value, pickled; raise a TypeError that says why it cannot be."""
    import cloudpickle

    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"the last value, a {type(value).__name__}, cannot be sent to the notebook ({error}):"
            " end the cell with numbers, tensors or plain containers of them"
        ) from None


def run(folder: Path) -> None:
    """Run a cell in a new `__main__`, and print its last value or report it."""
    source, pushed, wanted, paths = pickle.loads((folder / "cell.pickle").read_bytes())
    sys.path += [path for path in paths if path not in sys.path]
    sys.argv = [CELL]
    namespace = new_main_module()
    namespace.update(pickle.loads(pushed))
    value = execute(source, namespace, "%%horovodrun", wanted)
    if wanted:
        _write_report(folder, {"value": pickled_value(value)})


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write a report, whole or not at all: a rank may be killed at any time."""
    rank = os.environ["HOROVOD_RANK"]
    temporary = folder / f"unfinished.{rank}"
    temporary.write_bytes(pickle.dumps(report))
    temporary.rename(folder / f"report.{rank}")


def main() -> int:
    """Run this rank's cell; return the exit code."""
    # One pipe keeps what a cell prints and what it warns of in order.
    os.dup2(1, 2)
    folder = Path(os.environ.pop(VARIABLE))
    try:
        run(folder)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code)
            code = 1
        _write_report(folder, {"exit": code})  # other ranks may fail before this one has ended
        return code
    except BaseException as error:
        try:
            _write_report(folder, {"error": describe(error)})
        except OSError:  # a full disk
            traceback.print_exception(error)
        sys.stdout.flush()
        if type(error).__name__ == LOST:
            time.sleep(SECONDS_BEHIND_LOST)
        os._exit(1)  # without Horovod's shutdown, which would wait for the other ranks
    return 0


if __name__ == "__main__":
    sys.exit(main())
