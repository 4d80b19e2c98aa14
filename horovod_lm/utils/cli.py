"""Shared by all commands: `--config`, `--set`, error messages, printed commands."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from horovod_lm.utils.errors import LostRankError, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# Horovod: horovodrun reports the rank that ends first, which should be the one that failed.
_SECONDS_AFTER_LOST_RANK = 2
_SECONDS_AFTER_FIRST_RANK = 5


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--config FILE` and the repeatable `--set section.key=value` to `parser`."""
    parser.add_argument(
        "--config",
        default=default,
        required=default is None,
        metavar="FILE",
        help="a YAML file, for example configs/tiny.yaml"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, for example --set training.learning_rate=1e-3 (repeatable)",
    )


def command(module: str, *arguments: str | Path, under: Sequence[str] = ()) -> str:
    """Return a shell command that runs a module, quoted for pasting.

    Absolute paths are shortened by `shown`. `under` is the launcher, for example
    `[program("horovodrun"), "-np", "2"]`.
    """
    words = [*under, program("python"), "-m", module, *arguments]
    return shlex.join(shown(word) if os.path.isabs(word) else str(word) for word in words)


def program(name: str) -> str:
    """Return `python` or `horovodrun` if PATH finds this environment's, else its absolute path."""
    python = Path(sys.executable)
    own = python if name == "python" else python.with_name(name)
    found = shutil.which(name)
    # Not `samefile` alone: the Pythons of several environments may link to one file.
    if found and Path(found).parent.resolve() == own.parent.resolve():
        if os.path.samefile(found, own):
            return name
    return str(own)


def shown(path: str | Path) -> str:
    """Return a path for a command in the working directory: relative if that is shorter."""
    absolute = os.path.abspath(path)
    try:
        relative = os.path.relpath(absolute)
    except OSError:  # the working directory was deleted
        return absolute
    # Without a folder, a shell would search PATH for a program, and "-x" would be an option.
    relative = relative if os.sep in relative else os.path.join(os.curdir, relative)
    return min(absolute, relative, key=len)


def end_at_once() -> None:
    """Skip the garbage collection at exit, which would visit every object of torch."""
    atexit.register(gc.freeze)


def run_cli(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> None:
    """Run `main(argv)` and exit with its result; 2 and a message for a user's error."""
    end_at_once()
    atexit.register(_flush_output)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        lost = isinstance(error, LostRankError)
        if os.environ.get("HOROVOD_LOCAL_RANK", "0") != "0" and not lost:
            # Horovod: prints an error of all ranks only once: when local rank 0 ends, horovodrun
            # ends the others before they print it.
            time.sleep(_SECONDS_AFTER_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        if lost:
            time.sleep(_SECONDS_AFTER_LOST_RANK)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)


def _flush_output() -> None:
    """Flush standard output; a reader that has ended, such as `head`, is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass  # a full disk: Python itself reports it when it exits
