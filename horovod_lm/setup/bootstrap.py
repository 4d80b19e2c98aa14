"""What `make setup` and `make doctor` start, with any Python; `--help` lists the options.

Python 2.7 can still read this file: a Python that is too old ends here, with one sentence. The rest
is in `environment`, which needs the standard library only.
"""

import os
import sys

OLDEST = 10  # of Python 3, as in pyproject.toml


def main():
    """Stop with one sentence under an old Python; otherwise run the set-up or the doctor."""
    if sys.version_info < (3, OLDEST):
        sys.stderr.write(
            "error: Python 3.%d or newer is needed, and this is %d.%d; install it, or name one that"
            " is installed, for example: make setup PYTHON=python3.%d\n"
            % (OLDEST, sys.version_info[0], sys.version_info[1], OLDEST)
        )
        sys.exit(2)
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from horovod_lm.setup import doctor, environment
    from horovod_lm.utils.cli import run_cli

    if sys.argv[1:2] == ["doctor"]:
        run_cli(doctor.main, sys.argv[2:])
    run_cli(environment.main)


if __name__ == "__main__":
    main()
