"""What each rank of a `%%horovodrun` cell runs: the cell's body, its last value, its error.

It reads the cell from the file or text that HOROVOD_LM_CELL holds, and reports, among what the cell
prints, in lines that begin with a mark: so it works on hosts that share nothing with the notebook.
"""

from __future__ import annotations

import ast
import base64
import builtins
import json
import linecache
import os
import sys
import threading
import time
import traceback
import types
import zlib
from collections.abc import Sequence

from horovod_lm.jupyter.supervisor import MARK

CELL = "<cell>"  # the name of the file that the cell's code stands in
VARIABLE = "HOROVOD_LM_CELL"
DEADLINE = "HOROVOD_LM_DEADLINE"  # seconds since 1970, when the cell will be ended
SECONDS_TO_SAY_WHERE = 1.0  # before that
LARGEST_RESULT = 32 * 2**20  # bytes, pickled
SECONDS_TO_BE_ENDED = 15  # a rank that failed is ended by its supervisor, not by itself


def pack(source: str, **options) -> bytes:
    """Return a cell and its options as the bytes that `unpack` reads."""
    return zlib.compress(json.dumps({"source": source, **options}).encode())


def unpack(variable: str) -> dict:
    """Return what `pack` was given: `@PATH` names a file, everything else is the text itself."""
    if variable.startswith("@"):
        with open(variable[1:], "rb") as file:
            packed = file.read()
    else:
        packed = base64.b64decode(variable)
    return json.loads(zlib.decompress(packed))


def parse(source: str) -> tuple[types.CodeType, types.CodeType | None]:
    """Compile a cell: its body, and the expression that it ends with, if it does.

    Raises:
        SyntaxError: the cell is not Python; its line numbers are those of the notebook's cell.
    """
    # The first line of a cell is the magic, so its body begins on the second.
    tree = ast.parse("\n" + source, CELL)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, CELL, "exec")
    return body, compile(ast.Expression(last.value), CELL, "eval") if last else None


def run(cell: dict) -> None:
    """Run a cell in a fresh `__main__`, and report its last value."""
    sys.path += [path for path in cell["paths"] if path not in sys.path]
    main = types.ModuleType("__main__", "A cell on one rank.")
    main.__dict__.update({"__builtins__": builtins, **_pushed(cell["push"])})
    sys.modules["__main__"] = main
    sys.argv = [CELL]
    lines = ["%%horovodrun\n", *cell["source"].splitlines(keepends=True)]
    linecache.cache[CELL] = (sum(map(len, lines)), None, lines, CELL)
    body, expression = parse(cell["source"])
    exec(body, main.__dict__)
    value = eval(expression, main.__dict__) if expression else None
    if cell["wanted"]:
        _report_value(value)
    elif value is not None and not cell["source"].rstrip().endswith(";"):
        print(repr(value))


def report(kind: str, **values) -> None:
    """Send one report to the notebook."""
    line = base64.b64encode(json.dumps({"kind": kind, **values}).encode()).decode()
    sys.stdout.flush()
    sys.stdout.write(f"{MARK}{line}\n")
    sys.stdout.flush()


def describe(error: BaseException) -> dict:
    """Return an error's name, text, line of the cell, and its traceback as the reader needs it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != CELL:
        trace = trace.tb_next
    frames = traceback.extract_tb(trace)
    shown = traceback.TracebackException(type(error), error, trace)
    at = [frame.lineno for frame in frames if frame.filename == CELL]
    return {
        "name": type(error).__name__,
        "text": str(error),
        "line": at[-1] if at else getattr(error, "lineno", None),
        "traceback": list(shown.format()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank's cell; a failing one waits to be ended, so that every rank can say why."""
    # One pipe, or what a cell prints and what it warns of would arrive in either order.
    os.dup2(1, 2)
    cell = unpack(os.environ.pop(VARIABLE))
    if DEADLINE in os.environ:
        _say_where_it_is_at(float(os.environ.pop(DEADLINE)) - SECONDS_TO_SAY_WHERE)
    try:
        run(cell)
    except SystemExit as end:
        return _exit_code(end)
    except BaseException as error:
        sys.stdout.flush()
        report("error", **describe(error))
        time.sleep(SECONDS_TO_BE_ENDED)
        os._exit(1)
    return 0


def _pushed(packed: str) -> dict:
    if not packed:
        return {}
    import cloudpickle

    return cloudpickle.loads(base64.b64decode(packed))


def packed_value(value) -> bytes:
    """Return a value as bytes that the notebook unpacks.

    Raises:
        TypeError: it cannot be pickled.
        ValueError: it is too large.
    """
    import cloudpickle

    try:
        packed = cloudpickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"the last value, a {type(value).__name__}, cannot be sent to the notebook ({error}):"
            " end the cell with numbers, tensors or plain containers of them"
        ) from None
    if len(packed) > LARGEST_RESULT:
        raise ValueError(
            f"the last value has {len(packed) / 2**20:.0f} MiB, and at most"
            f" {LARGEST_RESULT / 2**20:.0f} can be sent to the notebook: save it to a file"
        )
    return packed


def _report_value(value) -> None:
    report("value", packed=base64.b64encode(packed_value(value)).decode())


def _say_where_it_is_at(moment: float) -> None:
    main_thread = threading.main_thread().ident

    def say() -> None:
        frames = traceback.extract_stack(sys._current_frames()[main_thread])
        at = [frame for frame in frames if frame.filename == CELL]
        if at:
            report("where", line=at[-1].lineno, code=at[-1].line)

    timer = threading.Timer(moment - time.time(), say)
    timer.daemon = True
    timer.start()


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code)
    return 1


if __name__ == "__main__":
    sys.exit(main())
