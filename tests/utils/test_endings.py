"""A command line ends without looking through all that it holds."""

from __future__ import annotations

import subprocess
import sys

COMMAND = """
import atexit, gc
from horovod_lm.utils.cli import run_cli

atexit.register(lambda: print("frozen:", gc.get_freeze_count() > 1000))
run_cli(lambda _: 3)
"""


def test_a_command_leaves_its_memory_to_the_system_and_keeps_its_exit_code():
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("frozen: True\n", 3), done.stderr
