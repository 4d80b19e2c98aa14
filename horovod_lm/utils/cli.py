"""What every command line shares: `--config`, `--set`, errors as sentences, printed commands."""

from __future__ import annotations

import argparse
import atexit
import gc
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
# Horovod: horovodrun names the rank that ends first, which should be the one that failed.
SECONDS_BEHIND_THE_LOST_RANK = 3
SECONDS_BEHIND_THE_FIRST_RANK = 5


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
    """Return the shell command that runs a module, for a message: it works when it is pasted.

    Args:
        module: its name, for example `horovod_lm.train`.
        arguments: its arguments; absolute paths are written as `shown` writes them.
        under: the words of the launcher, for example `[program("horovodrun"), "-np", "2"]`.
    """
    words = [*under, program("python"), "-m", module, *arguments]
    return shlex.join(shown(word) if os.path.isabs(word) else str(word) for word in words)


def program(name: str) -> str:
    """Return how to start a program of this environment from the shell that started this process.

    Args:
        name: `python` or `horovodrun`.

    Returns:
        The name where `PATH` has this environment's; otherwise the absolute path.
    """
    python = Path(sys.executable)
    own = python if name == "python" else python.with_name(name)
    found = shutil.which(name)
    # Not `samefile` alone: the Pythons of all environments may be links to one file.
    if found and Path(found).parent.resolve() == own.parent.resolve():
        if os.path.samefile(found, own):
            return name
    return str(own)


def shown(path: str | Path) -> str:
    """Return a path as a command in the working directory can use it: relative where shorter."""
    absolute = os.path.abspath(path)
    try:
        relative = os.path.relpath(absolute)
    except OSError:  # the working directory was deleted
        return absolute
    # Without a folder, a shell would look for a program on PATH, and "-x" would be an option.
    relative = relative if os.sep in relative else os.path.join(os.curdir, relative)
    return min(absolute, relative, key=len)


def end_at_once() -> None:
    """Skip Python's last garbage collection when this process ends.

    It would visit every object of torch at the end of every rank. Handlers of `atexit` still run.
    """
    atexit.register(gc.freeze)


def run_cli(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> None:
    """Run `main(argv)` and exit: 0 when all went well, 2 with a sentence on a user's error."""
    end_at_once()
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        lost = isinstance(error, LostRankError)
        if os.environ.get("HOROVOD_LOCAL_RANK", "0") != "0" and not lost:
            # Horovod: an error of all ranks is printed once. When local rank 0 ends, horovodrun
            # ends the others before they print it; a rank that is left has an error of its own.
            time.sleep(SECONDS_BEHIND_THE_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        if lost:
            time.sleep(SECONDS_BEHIND_THE_LOST_RANK)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # a reader such as `head` has ended: this is no error
        sys.exit(0)
