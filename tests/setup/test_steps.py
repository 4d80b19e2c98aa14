"""Commands of set-up and build: their end in every case, and the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from horovod_lm.setup import steps
from tests.conftest import alive


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and alive(psutil.Process(pid))


CALLER = """
import sys
from horovod_lm.setup import steps
from horovod_lm.utils.cli import run_cli
steps.interrupt_on_termination()
run_cli(lambda _: steps.call(["sh", "-c", sys.argv[1]], grace=float(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("child", "number", "grace"),
    [
        ("sleep 600", signal.SIGTERM, 60),
        ("trap '' INT; sleep 600", signal.SIGINT, 0.2),  # deaf to SIGINT: it is killed
        ("sleep 600", None, 60),  # as a shell starts background jobs: SIGINT is ignored
    ],
)
def test_a_signal_ends_every_process_of_a_command(tmp_path, child, number, grace):
    line = f"sh -c '{child.replace(chr(39), chr(34))}' & echo $! > pid; wait"
    start = "trap '' INT; exec" if number is None else "exec"
    caller = subprocess.Popen(
        ["sh", "-c", f'{start} "$@"', "sh", sys.executable, "-c", CALLER, line, str(grace)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(steps.__file__).parents[2])},
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 30)
    caller.send_signal(number or signal.SIGTERM)
    assert caller.wait(timeout=20) == 130
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


HOLD = """
import sys, time
from pathlib import Path
from horovod_lm.setup.steps import lock
with lock(Path(sys.argv[1]), "nobody"):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_waits_for_the_first_unless_that_was_killed(tmp_path, capsys, killed):
    holder = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), "600" if killed else "1.5"]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        if killed:
            first.kill()
            first.wait()
        with steps.lock(tmp_path / "lock", "another set-up"):
            wait_for(lambda: first.poll() is not None, 1)
    waited = "another set-up is running; waiting for it...\n"
    assert capsys.readouterr().out == ("" if killed else waited)
