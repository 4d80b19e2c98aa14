"""Progress of a command: a line that is updated on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TextIO

_SECONDS_BETWEEN_UPDATES = 0.2
_CLEAR_LINE = "\r\x1b[K"


class ProgressLine:
    """Prints a status line, updated in place on a terminal, and messages.

    If the output is lost (the terminal was closed, the disk is full), it says so once and prints
    nothing more: the work is worth more than its messages. A reader that has ended, such as `head`,
    is not worth a warning. All ranks except rank 0 have `enabled=False`, and print nothing.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._terminal = self._stream.isatty()
        self._shown_at = 0.0
        self._open = False

    def update(self, text: str, keep: bool = False) -> None:
        """Update the status line; where that is impossible, print it if `keep` is True."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._terminal and (keep or now - self._shown_at > _SECONDS_BETWEEN_UPDATES):
            self._print(f"{_CLEAR_LINE}{text}", end="")
            self._shown_at, self._open = now, True
        elif not self._terminal and keep:
            self._print(text)

    def say(self, text: str) -> None:
        """Print a message."""
        if self._enabled:
            self._print((_CLEAR_LINE if self._open else "") + text)
            self._open = False

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, file=self._stream, flush=True)
        except OSError as error:
            # Also for what is printed later, and for the flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                return
            with suppress(OSError):
                reason = f"the output was lost ({error.strerror})"
                print(f"warning: {reason}: nothing more is printed", file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Format a duration: 7 s, 1:05, 2:03:04."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 2 steps."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
