"""Run one command, and end every process that it has started, however the kernel ends.

    python -m horovod_lm.jupyter.run_cell.supervisor LIFELINE EVENTS RANKS GRACE_PERIOD COMMAND ...

It is a process of its own because a kernel can be killed. LIFELINE is the reading end of a pipe
whose other end the kernel holds: when the kernel closes that end, or ends, the command is stopped
by SIGTERM, GRACE_PERIOD seconds, and SIGKILL for the whole process tree. The supervisor exits with
the command's exit code (128 and the signal's number if a signal ended it) when no process is left.
It writes the command's process id to the descriptor EVENTS.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

POLL_INTERVAL = 0.25  # seconds
SECONDS_TO_VANISH = 5.0  # after SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # Linux, sys/prctl.h


def find_ranks(root: psutil.Process) -> dict[int, psutil.Process]:
    """Return the Horovod ranks among the descendants of a process, by rank."""
    import psutil

    found: dict[int, psutil.Process] = {}
    for process in root.children(recursive=True):  # parents come before their children
        try:
            found.setdefault(int(process.environ()["HOROVOD_RANK"]), process)
        except (KeyError, ValueError, psutil.Error):
            continue
    return found


def stop_when_told(
    command: subprocess.Popen[bytes], lifeline: int, ranks: int, grace_period: float
) -> None:
    """Wait until the kernel closes the lifeline or ends, then stop the command."""
    parent = os.getppid()  # a fork of the kernel may hold the lifeline open
    while os.getppid() == parent:
        if select.select([lifeline], [], [], POLL_INTERVAL)[0]:
            break
    import psutil

    # Ranks that save need the signal themselves: horovodrun gives them 5 s only. Those on other
    # hosts can be reached only through horovodrun.
    found = find_ranks(psutil.Process())
    for process in found.values() if len(found) >= ranks else [command]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    time.sleep(grace_period)
    kill_tree(command)
    os._exit(128 + signal.SIGKILL)  # the command may be unkillable, and `main` would wait for it


def kill_tree(command: subprocess.Popen[bytes]) -> None:
    """Kill the command and all that it has started, and wait until they have ended."""
    import psutil

    deadline = time.monotonic() + SECONDS_TO_VANISH
    while (tree := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        command.poll()  # not psutil, which would take the exit code
        psutil.wait_procs([one for one in tree if one.pid != command.pid], timeout=0.1)


def main() -> int:
    """Run the command to its end; return its exit code."""
    lifeline, events, ranks = map(int, sys.argv[1:4])
    os.set_inheritable(lifeline, False)
    # A process whose parent has died becomes a child of this one, and can be found and ended.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        command = subprocess.Popen(sys.argv[5:], close_fds=False, start_new_session=True)
    except OSError as error:
        print(error)
        return 127
    os.write(events, json.dumps({"event": "started", "pid": command.pid}).encode() + b"\n")
    threading.Thread(
        target=stop_when_told, args=(command, lifeline, ranks, float(sys.argv[4])), daemon=True
    ).start()
    code = command.wait()
    kill_tree(command)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # its thread may be waiting
