"""How many cores there are to share. It imports nothing heavy."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Return how many cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
