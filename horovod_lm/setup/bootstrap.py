"""What `make setup` and `make doctor` start, with any Python; `--help` lists the options.

Python 2.7 can still read this file: a Python that is too old ends here, with one sentence. The rest
is in `environment`, which needs the standard library only.
"""

import io
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main():
    """Stop with one sentence under an old Python; otherwise run the set-up or the doctor."""
    with io.open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
        oldest = int(re.search(r'requires-python = ">=3\.(\d+)"', file.read()).group(1))
    if sys.version_info < (3, oldest):
        sys.stderr.write(
            "error: Python 3.%d or newer is needed, and this is %d.%d; install it, or name one that"
            " is installed, for example: make setup PYTHON=python3.%d\n"
            % (oldest, sys.version_info[0], sys.version_info[1], oldest)
        )
        sys.exit(2)
    sys.path[0] = ROOT
    from horovod_lm.utils.cli import run_cli

    if sys.argv[1:2] == ["doctor"]:
        from horovod_lm.setup import doctor

        run_cli(doctor.main, sys.argv[2:])
    else:
        from horovod_lm.setup import environment

        run_cli(environment.main)


if __name__ == "__main__":
    main()
