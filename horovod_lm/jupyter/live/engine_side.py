"""What runs in the engines of live ranks: a rank's start and end, and each cell.

An engine is an ipyparallel engine in whose main thread Horovod runs. Whatever fails there shuts
Horovod down on that rank, so that the other ranks get an error instead of waiting for ever.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.utils.cli import end_at_once

CONNECTION = "security/ipcontroller-engine.json"  # in the profile's folder
SECONDS_FOR_CONTROLLER = 60.0
SECONDS_TO_BE_INTERRUPTED = 0.5  # if it lasts longer, the rank waits inside Horovod
_busy = threading.Event()
_shutting_down = threading.Lock()
_task = 0  # counts the tasks of this engine


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
    """Shut Horovod down on this engine, if it runs."""
    import horovod.torch as hvd

    # Horovod: when two threads shut it down at once, the later one waits for ever, and an
    # interrupt shuts it down from a thread of its own.
    with _shutting_down:
        hvd.shutdown()


def run_cell(source: str, wanted: bool) -> dict[str, Any]:
    """Run a cell's body in the engine's namespace.

    Args:
        source: Python, as IPython understands it.
        wanted: whether its last value is returned instead of being shown.

    Returns:
        `{"value": bytes}`, pickled, or `{"error": {...}}` as `rank_cell.describe` returns it.
    """
    return _guarded(lambda: _execute(source, wanted))


def run_function(packed: bytes) -> dict[str, Any]:
    """Call a function that cloudpickle packed with its arguments; return what `run_cell` does."""

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
        return {"value": rank_cell.pickled_value(work())}
    except BaseException as error:
        end_rank()  # Horovod: the other ranks wait for this one until it does
        return {"error": rank_cell.describe(error)}
    finally:
        _busy.clear()
        sys.stderr = stderr


def _execute(source: str, wanted: bool) -> Any:
    source = _shell().transform_cell(source)
    value = rank_cell.execute(source, user_namespace(), "%%px")
    if wanted:
        return value
    if rank_cell.is_shown(value, source):
        _show(value)
    return None


def _show(value: Any) -> None:
    """Show a picture as a picture, and everything else as text."""
    if hasattr(value, "_repr_png_") or hasattr(value, "_repr_html_"):
        from IPython.display import display

        display(value)
    else:
        print(repr(value))
    vars(builtins)["_"] = value


def _shell() -> Any:
    from IPython import get_ipython

    return get_ipython()


def user_namespace() -> dict[str, Any]:
    """Return what cells on this engine see."""
    return _shell().user_ns


@cache
def _free_when_interrupted() -> None:
    """Shut Horovod down when an interrupt does not reach Python, because the rank waits in it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGINT and _busy.is_set():
                interrupted = _task
                time.sleep(SECONDS_TO_BE_INTERRUPTED)
                if _busy.is_set() and _task == interrupted:  # not a later task by now
                    end_rank()

    threading.Thread(target=listen, daemon=True, name="interrupts").start()


def whole_json(path: Path) -> str:
    """Return a file's text once it exists and is complete JSON; "" until then."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError):
        return ""
    return text


def main(arguments: list[str]) -> None:
    """Run one engine until it is told to end.

    Args:
        arguments: `ipengine`'s, the profile's folder first.
    """
    end_at_once()
    # Imported while the controller starts, so that the first cell need not wait for it.
    import horovod.torch  # noqa: F401
    from ipyparallel.engine.app import IPEngine

    # ipyparallel: it reads the controller's file as soon as it exists, even half written.
    connection = Path(arguments[0].partition("=")[2], CONNECTION)
    deadline = time.monotonic() + SECONDS_FOR_CONTROLLER
    while not whole_json(connection) and time.monotonic() < deadline:
        time.sleep(0.02)

    application = IPEngine.instance()
    application.initialize(arguments)
    application.start()


if __name__ == "__main__":
    # Tasks name this module, so it is run as itself and not as __main__.
    from horovod_lm.jupyter.live import engine_side

    engine_side.main(sys.argv[1:])
