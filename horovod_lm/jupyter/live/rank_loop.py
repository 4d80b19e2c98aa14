"""What the process of a live rank runs: it executes what the notebook sends, in its main thread.

Whatever fails there shuts Horovod down on that rank, so that the other ranks get an error instead
of waiting for it.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.jupyter.run_cell.framed_horovodrun import EVENTS_VARIABLE
from horovod_lm.utils.cli import end_at_once

SECONDS_TO_BE_INTERRUPTED = 0.5  # if it lasts longer, the rank waits inside Horovod
_numbers = itertools.count(1)
_running = 0  # the number of the request that is being executed; 0: none
_shutting_down = threading.Lock()


def start_rank(env: dict[str, str], threads: int) -> bytes:
    """Make this process a rank with a GPU, if there is one; its variables stay.

    `env` holds Horovod's settings, the rank and the size among them.
    """
    import horovod.torch as hvd
    import torch

    from horovod_lm.utils.distributed import choose_device

    end_rank()
    for name in [name for name in os.environ if name.startswith("HOROVOD_")]:
        del os.environ[name]
    os.environ.update(env)
    torch.set_num_threads(threads)
    hvd.init()
    device = choose_device(local_rank=hvd.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what `.cuda()` in a cell means
    namespace().update(hvd=hvd, torch=torch)
    return pickle.dumps(None)


def end_rank() -> None:
    """Shut Horovod down in this process, if it runs."""
    import horovod.torch as hvd

    # Horovod: when two threads shut it down at once, the later one never returns, and an interrupt
    # shuts it down from a thread of its own.
    with _shutting_down:
        hvd.shutdown()


def run_cell(source: str, wanted: bool) -> bytes:
    """Run a cell's body; return its last value, pickled, if it is `wanted`, else print it."""
    return rank_cell.pickled_value(rank_cell.execute(source, namespace(), "%%px", wanted))


def run_function(packed: bytes) -> bytes:
    """Call a function that cloudpickle packed with its arguments; return its value, pickled."""
    function, args, kwargs = pickle.loads(packed)
    return rank_cell.pickled_value(function(*args, **kwargs))


def namespace() -> dict[str, Any]:
    """Return the variables that the cells of this rank share."""
    return vars(sys.modules["__main__"])


OPERATIONS: dict[str, Callable[..., bytes]] = {
    "start": start_rank,
    "cell": run_cell,
    "function": run_function,
}


def _execute(operation: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return a report as that of a cell: see `rank_cell`."""
    global _running
    try:
        _running = next(_numbers)
        try:
            return {"value": OPERATIONS[operation](*arguments)}
        finally:
            _running = 0  # from here on no interrupt is raised
    except BaseException as error:
        end_rank()  # Horovod: the other ranks wait for this one until it does
        return {"error": rank_cell.describe(error)}


def _listen_for_interrupts() -> None:
    """Shut Horovod down when an interrupt does not reach Python, because the rank waits in it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        if _running:
            raise KeyboardInterrupt

    def listen() -> None:
        while number := os.read(reading, 1):
            interrupted = _running
            if number[0] == signal.SIGINT and interrupted:
                time.sleep(SECONDS_TO_BE_INTERRUPTED)
                if _running == interrupted:  # not a later request by now
                    end_rank()

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=listen, daemon=True, name="interrupts").start()


def main() -> None:
    """Execute requests until the notebook closes the connection."""
    import horovod.torch  # noqa: F401  not in the first request, whose ranks would wait

    end_at_once()
    os.close(int(os.environ.pop(EVENTS_VARIABLE)))  # a cell could write to it
    rank_cell.new_main_module()
    # One pipe keeps what a cell prints, what it warns of, and Horovod's log in order.
    os.dup2(1, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stderr = sys.stdout
    _listen_for_interrupts()
    with Connection(int(sys.argv[1])) as notebook:
        notebook.send("ready")
        while True:
            try:
                operation, arguments, end_of_output = notebook.recv()
            except EOFError:
                return
            answer = _execute(operation, arguments)
            sys.stdout.flush()
            os.write(1, end_of_output.encode())
            notebook.send(answer)


if __name__ == "__main__":
    main()
