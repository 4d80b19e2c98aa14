"""What `make setup` runs: python3 horovod_lm/installation/bootstrap.py --venv .venv

This file is kept so plain that a Python too old for the project can still read it, and say so in
a sentence. Everything else is in `environment`, which needs nothing but a Python new enough.
"""

import os
import subprocess
import sys

OLDEST_PYTHON = (3, 10)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def newer_python():
    """The name of a Python on PATH that is new enough and starts, or None."""
    for minor in range(13, OLDEST_PYTHON[1] - 1, -1):
        name = "python3.%d" % minor
        try:
            if subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL) == 0:
                return name
        except OSError:
            pass
    return None


def main():
    """Stop with one sentence under an old Python; else set the environment up."""
    if sys.version_info < OLDEST_PYTHON:
        newer = newer_python()
        cure = "use the one that is here: make setup PYTHON=" + newer if newer else "install one"
        sys.stderr.write(
            "error: Python 3.%d or newer is needed, and this is %d.%d; %s\n"
            % (OLDEST_PYTHON[1], sys.version_info[0], sys.version_info[1], cure)
        )
        sys.exit(2)
    sys.path[0] = ROOT
    from horovod_lm.installation import environment
    from horovod_lm.utils.cli import run_cli

    run_cli(environment.main)


if __name__ == "__main__":
    main()
