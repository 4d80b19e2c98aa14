"""A process that starts commands, watches them, and ends every process that they have started.

It is a process of its own because a kernel can be killed: then the socket between them closes, and
the supervisor ends its commands. It imports next to nothing, so that a cell starts as fast as
horovodrun does in a shell. Both sides write JSON, one object per line, to the socket. Nothing that
a command prints goes there except inside such an object, so no output can be taken for an event.

    requests  {"start": "horovodrun", "command": [...], "env": {...}, "cwd": PATH or null,
               "grace_period": 2, "limit": 0, "ranks": 2}
              {"signal": "rank 0", "number": 2}                        to that process alone
              {"stop": "horovodrun", "reason": "stopped", "after": 0}
    events    {"event": "started", "name": "horovodrun", "pid": 7}
              {"event": "output", "name": "horovodrun", "rank": null, "text": "..."}
              {"event": "rank_started", "rank": 0, "pid": 9}           only with "ranks"
              {"event": "frozen", "name": "horovodrun", "rank": 1, "seconds": 3}   and killed
              {"event": "ended", "name": "horovodrun", "code": 1, "reason": "", "left": []}
              and what a command writes to the descriptor that HOROVOD_LM_EVENTS names

The end of the requests stops all commands. A stop is SIGTERM, `grace_period` seconds, and SIGKILL
for the whole process tree.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

EVENTS_VARIABLE = "HOROVOD_LM_EVENTS"
SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_TO_EXIT = 0.02  # between the end of a command's output and its exit
SECONDS_FROZEN = 3.0  # a process stopped by SIGSTOP is killed when it is not continued by then
SECONDS_FOR_OUTPUT = 1.0  # after its exit, when a process that it has left holds its pipes
SECONDS_TO_VANISH = 5.0  # after SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # Linux, sys/prctl.h


@dataclass
class Command:
    """A started command and the times at which something is due."""

    name: str
    process: subprocess.Popen[bytes]
    grace_period: float
    ranks_expected: int
    limit_at: float
    stop_at: float = math.inf
    kill_at: float = math.inf
    exited_at: float = math.inf
    reason: str = ""
    open_pipes: int = 0
    ranks: dict[int, psutil.Process] = field(default_factory=dict)
    frozen_since: dict[int, float] = field(default_factory=dict)  # by process id


class Supervisor:
    """The commands of one kernel.

    Args:
        kernel: the socket to the kernel.
    """

    def __init__(self, kernel: socket.socket) -> None:
        self._kernel, self._rest = kernel, b""
        self._parent = os.getppid()
        self._commands: dict[str, Command] = {}
        self._selector = selectors.DefaultSelector()
        self._serving = True

    def run(self) -> None:
        """Serve requests until the kernel hangs up and every command has ended."""
        # A process whose parent has died becomes a child of this one, and can be found and ended.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._selector.register(self._kernel, selectors.EVENT_READ, self._read_requests)
        looked_at = 0.0
        try:
            while self._serving or self._commands:
                exiting = any(not command.open_pipes for command in self._commands.values())
                for key, _ in self._selector.select(
                    SECONDS_TO_EXIT if exiting else SECONDS_BETWEEN_LOOKS
                ):
                    key.data()
                if time.monotonic() - looked_at >= SECONDS_BETWEEN_LOOKS:
                    looked_at = time.monotonic()
                    for command in self._commands.values():
                        self._look_at(command)
                for command in list(self._commands.values()):
                    self._finish_if_ended(command)
        finally:
            for command in self._commands.values():
                self._kill_tree(command)

    # ---- requests ---------------------------------------------------------------------------

    def _read_requests(self) -> None:
        try:
            chunk = self._kernel.recv(65536)
        except ConnectionError:
            chunk = b""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "start" in request:
                self._start(request)
            elif "signal" in request:
                command = self._commands.get(request["signal"])
                if command is not None and command.process.poll() is None:
                    command.process.send_signal(request["number"])
            elif request["stop"] in self._commands:
                command = self._commands[request["stop"]]
                _stop(command, request["reason"], request["after"])
        if not chunk:
            self._hang_up("kernel")

    def _hang_up(self, reason: str) -> None:
        if self._serving:
            self._serving = False
            self._selector.unregister(self._kernel)
        for command in self._commands.values():
            _stop(command, reason)

    def _start(self, request: dict[str, Any]) -> None:
        name, env = request["start"], request["env"]
        (output, output_end), (events, events_end) = os.pipe(), os.pipe()
        try:
            process = subprocess.Popen(
                request["command"], cwd=request["cwd"], stdin=subprocess.DEVNULL,
                stdout=output_end, stderr=output_end, pass_fds=[events_end],
                env={**(os.environ if env is None else env), EVENTS_VARIABLE: str(events_end)},
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(output)
            os.close(events)
            self._emit("output", name=name, rank=None, text=f"{error}\n")
            self._emit("ended", name=name, code=127, reason="", left=[])
            return
        finally:
            os.close(output_end)
            os.close(events_end)
        limit_at = time.monotonic() + request["limit"] if request["limit"] else math.inf
        command = self._commands[name] = Command(
            name, process, request["grace_period"], request["ranks"], limit_at
        )
        self._emit("started", name=name, pid=process.pid)
        self._forward(command, output, self._output_of(command))
        self._forward(command, events, self._events_of())

    # ---- output -----------------------------------------------------------------------------

    def _forward(self, command: Command, pipe: int, take: Callable[[bytes], None]) -> None:
        def read() -> None:
            chunk = os.read(pipe, 65536)
            take(chunk)
            if not chunk:
                self._selector.unregister(pipe)
                command.open_pipes -= 1
                os.close(pipe)

        command.open_pipes += 1
        self._selector.register(pipe, selectors.EVENT_READ, read)

    def _output_of(self, command: Command) -> Callable[[bytes], None]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def take(chunk: bytes) -> None:
            text = decoder.decode(chunk, final=not chunk)
            if text:
                self._emit("output", name=command.name, rank=None, text=text)

        return take

    def _events_of(self) -> Callable[[bytes], None]:
        rest = b""

        def take(chunk: bytes) -> None:
            nonlocal rest
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            self._send(whole + end)  # a line cut short by the command's death stays in `rest`

        return take

    def _emit(self, event: str, **values: Any) -> None:
        self._send(json.dumps({"event": event, **values}).encode() + b"\n")

    def _send(self, lines: bytes) -> None:
        try:
            self._kernel.sendall(lines)
        except OSError:  # the kernel is gone
            self._hang_up("kernel")

    # ---- watching -----------------------------------------------------------------------------

    def _look_at(self, command: Command) -> None:
        now = time.monotonic()
        if os.getppid() != self._parent:  # a fork of the kernel may hold the socket open
            self._hang_up("kernel")
        if now > command.limit_at:
            _stop(command, "timeout")
        if command.ranks_expected:
            self._find_ranks(command)
        if now >= command.stop_at:
            command.stop_at = math.inf
            command.kill_at = now + command.grace_period
            # Ranks that save must hear of it themselves: horovodrun gives them 5 s only. Those on
            # other hosts can be reached only through horovodrun.
            here = len(command.ranks) >= command.ranks_expected > 0
            for process in command.ranks.values() if here else [command.process]:
                _quietly(process.terminate)
        if now >= command.kill_at:
            self._kill_tree(command)
        else:
            self._kill_frozen(command, now)

    def _find_ranks(self, command: Command) -> None:
        import psutil  # only now: the command is already under way

        try:
            found = psutil.Process(command.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in found:  # parents come before their children
            try:
                rank = int(process.environ()["HOROVOD_RANK"])
            except (KeyError, ValueError, psutil.Error):
                continue
            known = command.ranks.get(rank)
            # In an elastic job a new process may take a dead one's place.
            if known is None or not known.is_running():
                command.ranks[rank] = process
                self._emit("rank_started", rank=rank, pid=process.pid)

    def _kill_frozen(self, command: Command, now: float) -> None:
        """Kill a process that has been stopped for too long: the others would wait for it."""
        import psutil

        watched: list[tuple[int | None, int]] = [(None, command.process.pid)]
        if command.ranks_expected:
            watched = [(rank, process.pid) for rank, process in command.ranks.items()]
        for rank, pid in watched:
            try:
                frozen = psutil.Process(pid).status() == psutil.STATUS_STOPPED
            except psutil.NoSuchProcess:
                frozen = False
            if not frozen:
                command.frozen_since.pop(pid, None)
            elif now - command.frozen_since.setdefault(pid, now) >= SECONDS_FROZEN:
                self._emit("frozen", name=command.name, rank=rank, seconds=SECONDS_FROZEN)
                _quietly(psutil.Process(pid).kill)

    # ---- the end ------------------------------------------------------------------------------

    def _finish_if_ended(self, command: Command) -> None:
        code = command.process.poll()
        if code is None:
            return
        command.exited_at = min(command.exited_at, time.monotonic())
        if command.open_pipes and time.monotonic() < command.exited_at + SECONDS_FOR_OUTPUT:
            return
        left = self._kill_tree(command)
        del self._commands[command.name]
        code = code if code >= 0 else 128 - code
        self._emit("ended", name=command.name, code=code, reason=command.reason, left=left)

    def _kill_tree(self, command: Command) -> list[int]:
        """Kill whatever is left of a command; return the ids of processes that do not end."""
        import psutil

        deadline = time.monotonic() + SECONDS_TO_VANISH
        while (tree := self._tree(command)) and time.monotonic() < deadline:
            for process in tree:
                _quietly(process.kill)
            command.process.poll()  # not psutil, which would take the exit code
            psutil.wait_procs([one for one in tree if one.pid != command.process.pid], timeout=0.1)
        return [process.pid for process in tree]

    def _tree(self, command: Command) -> list[psutil.Process]:
        """Return every process of a command, those included whose parents have died."""
        import psutil

        starters = {one.process.pid for one in self._commands.values()}
        found: list[psutil.Process] = []
        for child in psutil.Process().children():
            own = child.pid == command.process.pid
            if child.pid not in starters:  # its parent has died
                own = len(starters) == 1 or _session(child.pid) == command.process.pid
            if own:
                found.append(child)
                try:
                    found += child.children(recursive=True)
                except psutil.NoSuchProcess:
                    pass
        return found


def _stop(command: Command, reason: str, after: float = 0.0) -> None:
    """Plan a command's end. The first reason counts; a later stop can only come sooner."""
    command.reason = command.reason or reason
    if command.kill_at == math.inf:
        command.stop_at = min(command.stop_at, time.monotonic() + after)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _quietly(end: Callable[[], None]) -> None:
    """Send a signal to a process that may have ended."""
    import psutil

    try:
        end()
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass


if __name__ == "__main__":
    # An interrupt of the kernel's process group is for the kernel, which decides about its jobs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as socket_to_kernel:
        Supervisor(socket_to_kernel).run()
