"""Errors that a user can cause and mend: one sentence saying what, where, and what to do."""

from __future__ import annotations


def last_line(printed: str) -> str:
    """Return the last line that is not empty: where a command says why it failed."""
    return next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")


class UserError(Exception):
    """An error a user can mend. Its text is the whole message: command lines print it alone."""

    def _render_traceback_(self) -> list[str]:
        # A notebook asks for this instead of showing the package's insides.
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A setting that does not exist, has the wrong type, or cannot work."""


class DataError(UserError, ValueError):
    """Text, tokens or prepared data that cannot be used as they are."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, cut short, unsafe, or of another model."""


class DistributedError(UserError, RuntimeError):
    """Horovod is missing, or the ranks cannot work together as they were started."""


class LostRankError(DistributedError):
    """Another rank is gone. What this rank says is its own, and no other rank says it."""
