"""What a command says while it works: a line renewed on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_SECONDS_BETWEEN_RENEWALS = 0.2
_CLEAR_LINE = "\r\x1b[K"


class ProgressLine:
    """A status line. On a terminal it is renewed in place; in a file or a pipe each one stays.

    Args:
        enabled: False: say nothing (every rank but the first).
        stream: where to; the standard output if None.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._terminal = self._stream.isatty()
        self._shown_at = 0.0
        self._open = False

    def update(self, text: str, keep: bool = False) -> None:
        """Show `text`.

        Args:
            keep: worth a line of its own where lines stay; on a terminal the next one replaces it.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        if self._terminal and (keep or now - self._shown_at > _SECONDS_BETWEEN_RENEWALS):
            print(f"{_CLEAR_LINE}{text}", end="", file=self._stream, flush=True)
            self._shown_at, self._open = now, True
        elif not self._terminal and keep:
            print(text, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays, also on a terminal."""
        if self._enabled:
            print((_CLEAR_LINE if self._open else "") + text, file=self._stream, flush=True)
            self._open = False


def format_seconds(seconds: float) -> str:
    """Return a duration as a person writes it: 7 s, 1:05, 2:03:04."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
