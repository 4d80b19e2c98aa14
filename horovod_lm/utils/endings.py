"""How a process ends."""

from __future__ import annotations

import atexit
import gc


def end_at_once() -> None:
    """Let this process, when it ends, leave its memory to the system.

    Python would look through every object of torch for some that nobody can reach, at the end of
    every rank. Handlers of `atexit` run as ever.
    """
    atexit.register(gc.freeze)
