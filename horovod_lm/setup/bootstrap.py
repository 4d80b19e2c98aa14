"""What `make setup` and `make doctor` start, with any Python; `--help` lists the options.

A Python too old for the project can still read this file, and say so in one sentence. The rest is
in `environment`, which needs the standard library alone.
"""

import io
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def oldest_python():
    """Return the oldest minor version of Python 3 that pyproject.toml allows."""
    with io.open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
        return int(re.search(r'^requires-python = ">=3\.(\d+)"', file.read(), re.M).group(1))


def newer_python(oldest):
    """Return the name of a Python on PATH that is new enough and starts, or None."""
    for minor in range(13, oldest - 1, -1):
        name = "python3.%d" % minor
        try:
            with open(os.devnull, "w") as nowhere:
                if subprocess.call([name, "-c", ""], stderr=nowhere) == 0:
                    return name
        except OSError:
            pass
    return None


def main():
    """Stop with one sentence under an old Python; otherwise run the set-up or the doctor."""
    oldest = oldest_python()
    if sys.version_info < (3, oldest):
        newer = newer_python(oldest)
        fix = "use the one that is installed: make setup PYTHON=" + newer if newer else "install it"
        sys.stderr.write(
            "error: Python 3.%d or newer is needed, and this is %d.%d; %s\n"
            % (oldest, sys.version_info[0], sys.version_info[1], fix)
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
