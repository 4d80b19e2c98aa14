"""Errors that a user can cause and correct: one sentence says what, where, and what to do."""

from __future__ import annotations

import signal


def last_line(printed: str) -> str:
    """Return the last line that is not empty: most commands print their error there."""
    return next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")


def how_it_ended(code: int) -> str:
    """Return how a process ended, from its exit code as a shell gives it."""
    if code <= 128 or code - 128 not in {number.value for number in signal.Signals}:
        return f"ended with exit code {code}"
    name = signal.Signals(code - 128).name
    why = {
        "SIGKILL": "by somebody, or by the system when memory ran out",
        "SIGSEGV": "a crash in compiled code",
        "SIGABRT": "compiled code gave up",
    }.get(name, "")
    return f"was killed by {name}, exit code {code}" + (f" ({why})" if why else "")


class UserError(Exception):
    """An error that a user can correct. Commands print its text without a traceback."""

    def __str__(self) -> str:
        # The text may repeat what a file holds, and a terminal obeys control characters.
        text = super().__str__()
        shown = (one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)
        return "".join(shown)

    def _render_traceback_(self) -> list[str]:
        # IPython shows this instead of a traceback.
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A setting that does not exist, or has an invalid type or value."""


class DataError(UserError, ValueError):
    """Invalid text, tokens or prepared data."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, truncated, unsafe, or of another model."""


class DivergenceError(UserError, ArithmeticError):
    """The loss or a gradient is not finite."""


class DistributedError(UserError, RuntimeError):
    """Horovod is missing, or the ranks cannot work together."""


class LostRankError(DistributedError):
    """Another rank was lost. Each remaining rank reports its own error."""
