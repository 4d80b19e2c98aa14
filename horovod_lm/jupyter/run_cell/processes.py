"""Commands that end with this process, however it ends: the one keeper of a kernel's processes.

Cells, jobs and live ranks are all started here. Each command has a `supervisor`, which ends it; a
thread of this process reads what it prints, and reports events:

    {"event": "output", "rank": null, "text": "..."}      text as it was read, not line by line
    {"event": "ended", "code": 1, "stopped": false, "text": ""}
                                                          the last one: no process is left
    and those of the supervisor, and what the command writes, a line for each, to the descriptor
    that HOROVOD_LM_EVENTS names
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.jupyter.run_cell.framed_horovodrun import EVENTS_VARIABLE
from horovod_lm.jupyter.run_cell.supervisor import POLL_INTERVAL, SECONDS_TO_VANISH

SUPERVISOR = "horovod_lm.jupyter.run_cell.supervisor"
# Variables for the kernel alone, and those that would make ranks of what a rank has started.
_NOT_INHERITED = re.compile(
    r"^(HOROVOD_(RANK|SIZE|LOCAL_.*|CROSS_.*|HOSTNAME|GLOO_RENDEZVOUS.*)|MPLBACKEND|JPY_.*|PYDEVD_.*)$"
)
_ALL: weakref.WeakSet[SupervisedProcess] = weakref.WeakSet()


class SupervisedProcess:
    """A command with a supervisor.

    Args:
        command: the program and its arguments.
        on_event: called with each event, in a thread of its own.
        env: environment variables on top of this process's.
        grace_period: seconds between SIGTERM and SIGKILL when it is stopped.
        ranks: how many Horovod ranks it runs on this host, which are watched and stopped first; 0:
            they come and go.
    """

    def __init__(
        self, command: Sequence[str], on_event: Callable[[dict[str, Any]], None],
        env: Mapping[str, str] | None = None, *, cwd: str | None = None, grace_period: float = 2.0,
        ranks: int = 1, pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.pid: int | None = None  # the command's; None until it has started
        self._on_event, self._was_stopped = on_event, False
        (self._output, output_end), (self._events, events_end) = os.pipe(), os.pipe()
        self._lifeline, lifeline_end = socket.socketpair()
        with lifeline_end:
            self._supervisor = subprocess.Popen(
                [
                    sys.executable, "-m", SUPERVISOR, str(lifeline_end.fileno()), str(ranks),
                    str(grace_period), *command,
                ],
                env={**_inherited(), **(env or {}), EVENTS_VARIABLE: str(events_end)}, cwd=cwd,
                stdin=subprocess.DEVNULL, stdout=output_end, stderr=output_end,
                pass_fds=[lifeline_end.fileno(), events_end, *pass_fds], start_new_session=True,
            )  # fmt: skip
        os.close(output_end)
        os.close(events_end)
        self._thread = threading.Thread(target=self._read, daemon=True, name="processes")
        self._thread.start()
        _ALL.add(self)

    def stop(self) -> None:
        """Make the supervisor stop the command; return at once."""
        self._was_stopped = True
        with contextlib.suppress(OSError):  # it has ended
            self._lifeline.shutdown(socket.SHUT_WR)

    def signal(self, number: int) -> None:
        """Send a signal to the command's own process."""
        if self.pid is not None and self._supervisor.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> None:
        """Stop the command, and return when no process is left."""
        self.stop()
        self._thread.join()

    def _read(self) -> None:
        message = ""
        try:
            self._follow()
        except Exception as error:
            message = f"the reader of its events failed: {type(error).__name__}: {error}\n"
            self.stop()
        code = self._supervisor.wait()
        if code < 0:
            code = 128 + signal.SIGKILL
            message = message or "its supervisor was killed\n"
        self._lifeline.close()
        os.close(self._output)
        os.close(self._events)
        stopped = self._was_stopped and not message
        self._on_event({"event": "ended", "code": code, "stopped": stopped, "text": message})

    def _follow(self) -> None:
        """Report what the command prints and the events, until its supervisor has ended."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        cut: dict[int, bytes] = defaultdict(bytes)  # lines cut short by the writer's death stay
        with selectors.DefaultSelector() as selector:
            for source in (self._output, self._events, self._lifeline.fileno()):
                selector.register(source, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(POLL_INTERVAL)
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    if not chunk:
                        selector.unregister(key.fd)
                    if key.fd == self._output:
                        if text := decoder.decode(chunk, final=not chunk):
                            self._on_event({"event": "output", "rank": None, "text": text})
                        continue
                    *lines, cut[key.fd] = (cut[key.fd] + chunk).split(b"\n")
                    for event in map(json.loads, lines):
                        self.pid = event["pid"] if event["event"] == "started" else self.pid
                        self._on_event(event)
                    if key.fd == self._lifeline.fileno() and not chunk:
                        if self._supervisor.wait() < 0:
                            kill_process_tree(self.pid)
                if not ready and self._supervisor.poll() is not None:
                    return  # an unkillable process holds the pipes


def _inherited() -> dict[str, str]:
    """Return the kernel's environment without the variables that are for the kernel alone."""
    env = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
    commands = str(Path(sys.executable).parent)
    return {**env, "PATH": os.pathsep.join([commands, env.get("PATH", os.defpath)])}


def kill_process_tree(pid: int | None) -> None:
    """Kill a process and all that it has started: what a killed supervisor cannot do."""
    try:
        root = psutil.Process(pid) if pid else None
        tree = [*root.children(recursive=True), root] if root else []
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=SECONDS_TO_VANISH)


@atexit.register
def _close_all() -> None:
    """Leave nothing behind when the kernel ends in the ordinary way."""
    running = list(_ALL)
    for process in running:
        process.stop()
    for process in running:
        process.close()
