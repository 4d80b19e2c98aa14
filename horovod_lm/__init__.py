"""Build a GPT-style language model and train it on many workers with Horovod.

The package is what the course imports, and it is meant to be read. Importing it is instant:
torch, Horovod and Jupyter are imported by the modules that use them, never here.
"""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("horovod_lm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
