"""What runs on the engines of a live cluster: a rank's start and end, and each cell's run.

An engine is an ipyparallel engine in whose main thread Horovod lives. Whatever fails there ends
Horovod on that rank, so that the other ranks hear of it instead of waiting for ever.
"""

from __future__ import annotations

import builtins
import json
import linecache
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from horovod_lm.jupyter import rank_cell
from horovod_lm.utils.endings import end_at_once

CONNECTION = "security/ipcontroller-engine.json"  # in the profile's folder
SECONDS_TO_BE_CALLED = 60.0
SECONDS_TO_BE_INTERRUPTED = 0.5  # then it waits in Horovod, which has to be ended under it
_busy = threading.Event()
_ending = threading.Lock()
_token = ""
_task = 0  # counts what this engine was given to do
_listening = False


def hostname() -> str:
    """Return the name of this engine's host."""
    return socket.gethostname()


def token() -> str:
    """Return what the one who started this engine calls it."""
    return _token


def built_with_mpi() -> bool:
    """Say whether the Horovod that is installed can talk over MPI."""
    import horovod.torch as hvd

    return hvd.mpi_built()


def mpi_place() -> tuple[int, int]:
    """Return the rank that Open MPI gave to this engine, and its process id."""
    return int(os.environ["OMPI_COMM_WORLD_RANK"]), os.getpid()


def start_rank(env: dict[str, str], threads: int) -> dict[str, Any]:
    """Make this engine a rank with a GPU, if there is one; its namespace stays.

    Args:
        env: Horovod's settings and this rank's place.
        threads: CPU threads of this rank.

    Returns:
        `{"rank": ..., "pid": ...}`.
    """
    import horovod.torch as hvd
    import torch

    from horovod_lm.utils.distributed import own_device

    _free_when_interrupted()
    end_rank()
    for name in [name for name in os.environ if name.startswith("HOROVOD_")]:
        del os.environ[name]
    os.environ.update(env)
    torch.set_num_threads(threads)
    hvd.init()
    device = own_device("auto", hvd.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what `.cuda()` in a cell means
    user_namespace().update(hvd=hvd, torch=torch)
    return {"rank": hvd.rank(), "pid": os.getpid()}


def end_rank() -> None:
    """End Horovod on this engine; nothing happens where it does not run."""
    import horovod.torch as hvd

    # Horovod: two threads that end it at once both wait for its thread, the later one for ever; an
    # interrupt ends it from a thread of its own.
    with _ending:
        hvd.shutdown()


def run_cell(source: str, wanted: bool) -> dict[str, Any]:
    """Run a cell's body in the engine's namespace.

    Args:
        source: Python, as IPython understands it.
        wanted: whether its last value goes back instead of being shown.

    Returns:
        `{"value": bytes}`, pickled, or `{"error": {...}}` as `rank_cell.describe` gives it.
    """
    return _guarded(lambda: _execute(source, wanted))


def run_function(packed: bytes) -> dict[str, Any]:
    """Call a function that cloudpickle packed with its arguments; returns what `run_cell` does."""

    def call() -> Any:
        import cloudpickle

        function, args, kwargs = cloudpickle.loads(packed)
        return function(*args, **kwargs)

    return _guarded(call)


def _guarded(work: Callable[[], Any]) -> dict[str, Any]:
    # One stream, or what a cell prints and what it warns of would arrive in either order.
    global _task
    stderr, sys.stderr = sys.stderr, sys.stdout
    _task += 1
    _busy.set()
    try:
        return {"value": rank_cell.packed_value(work())}
    except BaseException as error:
        end_rank()  # Horovod: the other ranks wait for this one until it does
        return {"error": rank_cell.describe(error)}
    finally:
        _busy.clear()
        sys.stderr = stderr


def _execute(source: str, wanted: bool) -> Any:
    namespace = user_namespace()
    source = _shell().transform_cell(source)
    lines = ["%%px\n", *source.splitlines(keepends=True)]
    linecache.cache[rank_cell.CELL] = (sum(map(len, lines)), None, lines, rank_cell.CELL)
    body, expression = rank_cell.parse(source)
    exec(body, namespace)
    value = eval(expression, namespace) if expression else None
    if wanted:
        return value
    if value is not None and not source.rstrip().endswith(";"):
        _show(value)
    return None


def _show(value: Any) -> None:
    """Show a picture as a picture, and everything else as text."""
    if hasattr(value, "_repr_png_") or hasattr(value, "_repr_html_"):
        from IPython.display import display

        display(value)
    else:
        print(repr(value))
    builtins._ = value


def _shell() -> Any:
    from IPython import get_ipython

    return get_ipython()


def user_namespace() -> dict[str, Any]:
    """Return what cells on this engine see."""
    return _shell().user_ns


@cache
def _free_when_interrupted() -> None:
    """End Horovod under a rank that an interrupt does not reach, because it waits for another."""
    global _listening
    if _listening:
        return
    _listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGINT and _busy.is_set():
                interrupted = _task
                time.sleep(SECONDS_TO_BE_INTERRUPTED)
                # By now it may do something else, which nobody has interrupted.
                if _busy.is_set() and _task == interrupted:
                    end_rank()

    threading.Thread(target=listen, daemon=True, name="interrupts").start()


def whole_json(path: Path) -> str:
    """Return a file's text once it is there and whole; "" until then."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError):
        return ""
    return text


def _end_with_the_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def main(arguments: list[str]) -> None:
    """Run one engine until it is told to end.

    Args:
        arguments: what this engine is called, then `ipengine`'s, the profile's folder first.
    """
    global _token
    _token = arguments[0]
    _end_with_the_parent()
    end_at_once()
    # Imported while the controller starts, so that the first cell need not wait for it.
    import horovod.torch  # noqa: F401
    from ipyparallel.engine.app import IPEngine

    # ipyparallel: it reads the controller's file as soon as it exists, even half written.
    connection = Path(arguments[1].partition("=")[2], CONNECTION)
    deadline = time.monotonic() + SECONDS_TO_BE_CALLED
    while not whole_json(connection) and time.monotonic() < deadline:
        time.sleep(0.02)

    application = IPEngine.instance()
    application.initialize(arguments[1:])
    application.start()


if __name__ == "__main__":
    # Tasks name this module, so it is run as itself and not as __main__.
    from horovod_lm.jupyter import engine_side

    engine_side.main(sys.argv[1:])
