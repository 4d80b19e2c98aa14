"""Run one command, watch its ranks, and end every process of it, however the kernel ends.

    python -m horovod_lm.jupyter.run_cell.supervisor LIFELINE RANKS GRACE_PERIOD COMMAND ...

It is a process of its own because a kernel can be killed. LIFELINE is a socket whose other end the
kernel holds. When the kernel closes it, or ends, the command is stopped by SIGTERM, GRACE_PERIOD
seconds, and SIGKILL for the whole process tree. RANKS is the number of Horovod ranks that the
command runs on this host; 0: ranks come and go. The supervisor writes events to LIFELINE:

    {"event": "started", "pid": 7}                        the command
    {"event": "rank_started", "rank": 0, "pid": 9}
    {"event": "frozen", "rank": 1, "seconds": 3.0}        stopped by SIGSTOP, and killed

It exits with the command's exit code (128 and the signal's number if a signal ended it) when no
process is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil

POLL_INTERVAL = 0.25  # seconds
SECONDS_FROZEN = 3.0  # a rank stopped by SIGSTOP is killed when it is not continued by then
SECONDS_TO_VANISH = 5.0  # after SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # Linux, sys/prctl.h


def supervise(
    command: subprocess.Popen[bytes], lifeline: socket.socket, expected: int, grace_period: float,
    report: Callable[..., None],
) -> None:  # fmt: skip
    """Watch the ranks until the kernel closes the lifeline or ends, then stop the command."""
    ranks: dict[int, psutil.Process] = {}
    frozen_since: dict[int, float] = {}
    parent = os.getppid()  # a fork of the kernel may hold the lifeline open
    while os.getppid() == parent and not select.select([lifeline], [], [], POLL_INTERVAL)[0]:
        if not expected or sum(one.is_running() for one in ranks.values()) < expected:
            find_ranks(ranks, report)
        kill_frozen(ranks, frozen_since, report)
    find_ranks(ranks, report)
    # Ranks that save need the signal themselves: horovodrun kills what is left after the grace
    # period. Those on other hosts can be reached only through horovodrun.
    alive = [process for process in ranks.values() if process.is_running()]
    for process in alive if alive and len(alive) >= expected else [command]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    time.sleep(grace_period)
    kill_descendants(command)
    os._exit(128 + signal.SIGKILL)  # the command may be unkillable, and `main` would wait for it


def find_ranks(ranks: dict[int, psutil.Process], report: Callable[..., None]) -> None:
    """Report the ranks that have started, and add them to `ranks`, by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):  # parents before their children
        with contextlib.suppress(KeyError, ValueError, psutil.Error):
            found.setdefault(int(process.environ()["HOROVOD_RANK"]), process)
    for rank, process in found.items():
        # In an elastic job a new process may take a dead one's place.
        if rank not in ranks or not ranks[rank].is_running():
            ranks[rank] = process
            report("rank_started", rank=rank, pid=process.pid)


def kill_frozen(
    ranks: dict[int, psutil.Process], frozen_since: dict[int, float], report: Callable[..., None]
) -> None:
    """Kill the ranks that have been stopped for too long: the others would wait for them."""
    now = time.monotonic()
    for rank, process in ranks.items():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_STOPPED:
                frozen_since.pop(process.pid, None)
            elif now - frozen_since.setdefault(process.pid, now) >= SECONDS_FROZEN:
                report("frozen", rank=rank, seconds=SECONDS_FROZEN)
                process.kill()


def kill_descendants(command: subprocess.Popen[bytes]) -> None:
    """Kill the command and all that it has started, and wait until they have ended."""
    deadline = time.monotonic() + SECONDS_TO_VANISH
    while (tree := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        command.poll()  # not psutil, which would take the exit code
        psutil.wait_procs([one for one in tree if one.pid != command.pid], timeout=0.1)


def main() -> int:
    """Run the command to its end; return its exit code."""
    lifeline = socket.socket(fileno=int(sys.argv[1]))
    lifeline.set_inheritable(False)
    # A process whose parent has died becomes a child of this one, and can be found and ended.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def report(event: str, **values: object) -> None:
        with contextlib.suppress(OSError):  # the kernel is gone
            lifeline.sendall(json.dumps({"event": event, **values}).encode() + b"\n")

    command = subprocess.Popen(sys.argv[4:], close_fds=False, start_new_session=True)
    report("started", pid=command.pid)
    arguments = (command, lifeline, int(sys.argv[2]), float(sys.argv[3]), report)
    threading.Thread(target=supervise, args=arguments, daemon=True).start()
    code = command.wait()
    kill_descendants(command)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # its thread may be waiting
