"""Commands that end with this process, however it ends: the one keeper of a kernel's processes.

Cells, jobs and live ranks are all started here. Each command has a `supervisor`, which ends it; a
thread of this process reads what it prints and watches its ranks, and reports events:

    {"event": "started", "pid": 7}
    {"event": "output", "rank": null, "text": "..."}      text as it was read, not line by line
    {"event": "rank_started", "rank": 0, "pid": 9}
    {"event": "frozen", "rank": 1, "seconds": 3}          stopped by SIGSTOP, and killed
    {"event": "ended", "code": 1, "reason": "", "text": ""}
                                                          the last one: no process is left
    and what the command writes to the descriptor that HOROVOD_LM_EVENTS names, a line for each
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.jupyter.run_cell.framed_horovodrun import EVENTS_VARIABLE
from horovod_lm.jupyter.run_cell.supervisor import (
    POLL_INTERVAL,
    SECONDS_TO_VANISH,
    find_ranks,
)

SUPERVISOR = "horovod_lm.jupyter.run_cell.supervisor"
SECONDS_FROZEN = 3.0  # a rank stopped by SIGSTOP is killed when it is not continued by then
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
        cwd: its working directory; None: this process's.
        grace_period: seconds between SIGTERM and SIGKILL when it is stopped.
        ranks: how many Horovod ranks it runs on this host; they are watched, and stopped first.
        elastic: whether ranks come and go; `ranks` is then the smallest number of them.
        pass_fds: descriptors that the command inherits.

    Attributes:
        pid: the command's process id; None until it has started.
        supervisor: its supervisor's process id.
    """

    def __init__(
        self, command: Sequence[str], on_event: Callable[[dict[str, Any]], None],
        env: Mapping[str, str] | None = None, *, cwd: str | None = None, grace_period: float = 2.0,
        ranks: int = 1, elastic: bool = False, pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.pid: int | None = None
        self._on_event = on_event
        self._ranks_expected, self._elastic = ranks, elastic
        self._ranks: dict[int, psutil.Process] = {}
        self._frozen_since: dict[int, float] = {}
        self._reason, self._stop_at = "", math.inf
        (self._output, output_end), (self._events, events_end) = os.pipe(), os.pipe()
        lifeline_end, lifeline = os.pipe()
        self._lifeline = os.fdopen(lifeline, "wb")
        self._supervisor = subprocess.Popen(
            [
                sys.executable, "-m", SUPERVISOR, str(lifeline_end), str(events_end),
                str(ranks), str(grace_period), *command,
            ],
            env={**_inherited(), **(env or {}), EVENTS_VARIABLE: str(events_end)}, cwd=cwd,
            stdin=subprocess.DEVNULL, stdout=output_end, stderr=output_end,
            pass_fds=[lifeline_end, events_end, *pass_fds], start_new_session=True,
        )  # fmt: skip
        for end in (output_end, events_end, lifeline_end):
            os.close(end)
        self.supervisor = self._supervisor.pid
        self._thread = threading.Thread(target=self._read, daemon=True, name="processes")
        self._thread.start()
        _ALL.add(self)

    def stop(self, reason: str = "stopped", after: float = 0.0) -> None:
        """Stop the command, `after` seconds from now; return at once.

        The first reason counts; a later stop can only come sooner.
        """
        self._reason = self._reason or reason
        self._stop_at = min(self._stop_at, time.monotonic() + after)
        if not after:
            self._lifeline.close()

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
            self.stop("failed")
        code = self._supervisor.wait()
        if code < 0:
            kill_process_tree(self.pid)
            code, self._reason = 128 + signal.SIGKILL, self._reason or "failed"
            message = message or "its supervisor was killed\n"
        self._lifeline.close()
        os.close(self._output)
        os.close(self._events)
        self._emit("ended", code=code, reason=self._reason, text=message)

    def _emit(self, event: str, **values: Any) -> None:
        self._on_event({"event": event, **values})

    # ---- reading and watching -------------------------------------------------------------------

    def _follow(self) -> None:
        """Report what the command prints and what its ranks do, until its supervisor has ended."""
        decoder, rest, next_poll = codecs.getincrementaldecoder("utf-8")("replace"), b"", 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._events, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(POLL_INTERVAL)
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    if not chunk:
                        selector.unregister(key.fd)
                    if key.fd == self._events:
                        # A line cut short by the command's death stays in `rest`.
                        *lines, rest = (rest + chunk).split(b"\n")
                        for event in map(json.loads, lines):
                            self.pid = event["pid"] if event["event"] == "started" else self.pid
                            self._on_event(event)
                    elif text := decoder.decode(chunk, final=not chunk):
                        self._emit("output", rank=None, text=text)
                if not ready and self._supervisor.poll() is not None:
                    return  # an unkillable process holds the pipes
                if time.monotonic() >= next_poll:
                    self._poll()
                    next_poll = time.monotonic() + POLL_INTERVAL

    def _poll(self) -> None:
        now = time.monotonic()
        if now >= self._stop_at:
            self._lifeline.close()
        if (self._supervisor.poll() or 0) < 0:
            kill_process_tree(self.pid)
        alive = [one for one in self._ranks.values() if one.is_running()]
        if self._elastic or len(alive) < self._ranks_expected:
            self._find_ranks()
        for rank, process in self._ranks.items():
            self._kill_if_frozen(rank, process, now)

    def _find_ranks(self) -> None:
        try:
            found = find_ranks(psutil.Process(self.supervisor))
        except psutil.NoSuchProcess:
            return
        for rank, process in found.items():
            known = self._ranks.get(rank)
            # In an elastic job a new process may take a dead one's place.
            if known is None or not known.is_running():
                self._ranks[rank] = process
                self._emit("rank_started", rank=rank, pid=process.pid)

    def _kill_if_frozen(self, rank: int, process: psutil.Process, now: float) -> None:
        """Kill a rank that has been stopped for too long: the others would wait for it."""
        try:
            if process.status() != psutil.STATUS_STOPPED:
                self._frozen_since.pop(process.pid, None)
            elif now - self._frozen_since.setdefault(process.pid, now) >= SECONDS_FROZEN:
                self._emit("frozen", rank=rank, seconds=SECONDS_FROZEN)
                process.kill()
        except psutil.NoSuchProcess:
            pass


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
