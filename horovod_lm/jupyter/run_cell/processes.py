"""The kernel's side of a supervisor: commands that end with this process, however it ends."""

from __future__ import annotations

import atexit
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from horovod_lm.utils.errors import last_line

SUPERVISOR = "horovod_lm.jupyter.run_cell.supervisor"
LONGEST_KILL = 10.0  # seconds a supervisor has to kill its commands, after their grace period
_ALL: weakref.WeakSet[Processes] = weakref.WeakSet()


class Processes:
    """Named commands under one supervisor.

    Args:
        on_event: called with each event (see `supervisor`), in a thread of its own; the last one is
            `{"event": "closed"}`, when the supervisor has ended.

    Attributes:
        pids: process ids of the commands that run, by name.
        codes: exit codes of those that have ended, by name, in the order of their ends; 128 and the
            signal's number where a signal ended one.
        supervisor: its process id.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._on_event, self._grace_period = on_event, 0.0
        self.pids: dict[str, int] = {}
        self.codes: dict[str, int] = {}
        self._names: set[str] = set()  # of commands whose end was not reported yet
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair()
        self._complaints = tempfile.TemporaryFile()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SUPERVISOR, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=self._complaints, stderr=self._complaints, start_new_session=True,
            )  # fmt: skip
        self.supervisor = self._process.pid
        _ALL.add(self)
        self._thread = threading.Thread(target=self._read, daemon=True, name="supervisor")
        self._thread.start()

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None,
        *, cwd: str | None = None, grace_period: float = 2.0, limit: float = 0.0, ranks: int = 0,
    ) -> None:  # fmt: skip
        """Start a command.

        Args:
            name: its name in events; one that has ended may be started again.
            command: the program and its arguments.
            env: its environment; None: this process's.
            cwd: its working directory; None: this process's.
            grace_period: seconds between SIGTERM and SIGKILL when it is stopped.
            limit: seconds after which it is stopped; 0: none.
            ranks: how many Horovod ranks it starts, which are watched, and stopped first.
        """
        self._grace_period = max(self._grace_period, grace_period)
        with self._lock:
            self._names.add(name)
            self.codes.pop(name, None)
            closed = not self._thread.is_alive()
        if closed:
            self._lose([name])
            return
        self._ask(
            start=name, command=list(command), env=None if env is None else dict(env), cwd=cwd,
            grace_period=grace_period, limit=limit, ranks=ranks,
        )  # fmt: skip

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a command's own process."""
        self._ask(signal=name, number=int(number))

    def stop(self, name: str, reason: str = "stopped", after: float = 0.0) -> None:
        """Stop a command and what it has started, `after` seconds from now; return at once."""
        self._ask(stop=name, reason=reason, after=after)

    def hang_up(self) -> None:
        """Stop every command; the supervisor then ends. Return at once."""
        try:
            self._channel.shutdown(socket.SHUT_WR)
        except OSError:  # it has ended
            pass

    def close(self) -> None:
        """Stop every command, and return when all of them and the supervisor have ended."""
        self.hang_up()
        self._thread.join(self._grace_period + LONGEST_KILL)
        if self._thread.is_alive():
            self._process.kill()  # then `_read` ends what is left
            self._thread.join()

    def _ask(self, **request: Any) -> None:
        try:
            with self._lock:
                self._channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError:  # the supervisor has ended, and `_read` deals with that
            pass

    def _read(self) -> None:
        complaint = ""
        try:
            with self._channel.makefile("rb") as events:
                for line in events:
                    self._take(json.loads(line))
        except Exception as error:
            complaint = f"the reader of its events failed: {type(error).__name__}: {error}"
            self.hang_up()
        try:
            self._process.wait(self._grace_period + LONGEST_KILL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._channel.close()
        self._complaints.seek(0)
        said = last_line(self._complaints.read().decode(errors="replace"))
        self._complaints.close()
        if self._process.returncode < 0:
            said = "its supervisor was killed"
        try:
            self._lose(self._names, complaint or said)
        finally:
            self._on_event({"event": "closed"})

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            self.pids[event["name"]] = event["pid"]
        elif event["event"] == "ended":
            self.pids.pop(event["name"], None)
            self._names.discard(event["name"])
        self._on_event(event)
        if event["event"] == "ended":  # only now: who waits for the code may rely on the event
            self.codes[event["name"]] = event["code"]

    def _lose(self, names: Sequence[str] | set[str], why: str = "its supervisor has ended") -> None:
        """Do what a supervisor that has died cannot do any more."""
        for name in sorted(names):
            left = kill_process_tree(self.pids.get(name))
            code = 128 + signal.SIGKILL
            self._take({"event": "output", "name": name, "rank": None, "text": f"{why}\n"})
            self._take(
                {"event": "ended", "name": name, "code": code, "reason": "failed", "left": left}
            )


def kill_process_tree(pid: int | None, seconds: float = 5.0) -> list[int]:
    """Kill a process and all that it has started; return the ids of those that do not end."""
    try:
        root = psutil.Process(pid) if pid else None
        tree = [*root.children(recursive=True), root] if root else []
    except psutil.NoSuchProcess:
        tree = []
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    _, left = psutil.wait_procs(tree, timeout=seconds)
    return [process.pid for process in left]


@atexit.register
def _close_all() -> None:
    """Leave nothing behind when the kernel ends in the ordinary way."""
    running = list(_ALL)
    for processes in running:
        processes.hang_up()
    for processes in running:
        processes.close()
