"""What every command line of the project shares: `--config`, `--set`, and errors as sentences."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from horovod_lm.utils.endings import end_at_once
from horovod_lm.utils.errors import LostRankError, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# Horovod: horovodrun blames the rank that ends first, which should be the one that was lost.
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
            # Horovod: the ranks of a host meet the same error, and the first one's end ends them
            # all before they repeat it. Who is still here then has an error of its own to tell.
            time.sleep(SECONDS_BEHIND_THE_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        if lost:
            time.sleep(SECONDS_BEHIND_THE_LOST_RANK)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # a reader such as `head` left: nothing is wrong here
        sys.exit(0)
