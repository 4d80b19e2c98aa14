"""Starts the processes of a live cluster, says what becomes of them, and outlives none of them.

A process of its own, because a kernel can be killed: then its end of the pipe closes, and every
process that was started here is killed, a frozen one too. It imports next to nothing. On another
host it is started through ssh, and the pipe is the connection.

    its standard input     {"start": "rank 0", "command": [...], "env": {...}, "log": PATH}
                           {"watch": "rank 0", "pid": 8}: what one of them has started itself
                           {"kill": "rank 0"}, {"interrupt": "rank 0"}
                           {"write": "name", "text": "..."}: a file in its folder
                           the end of the file ends all of it
    its standard output    {"event": "started", "name": "rank 0", "pid": 7}
                           {"event": "frozen", "name": "rank 0"}, {"event": "woken", ...}
                           {"event": "ended", "name": "rank 0", "code": 137, "last": "its words"}
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time

SECONDS_BETWEEN_LOOKS = 0.1
LAST_BYTES = 2000
SECONDS_TO_END = 2.0  # that processes have to end by themselves before they are killed


class Guardian:
    """The processes of one cluster, by name.

    Args:
        folder: what the processes keep on disk; removed with them.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._parent = os.getppid()
        self._processes: dict[str, subprocess.Popen] = {}
        self._watched: dict[str, Watched] = {}
        self._logs: dict[str, str] = {}
        self._rest = b""

    def run(self) -> None:
        """Do what is asked for until nobody is left to ask, then end everything."""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            while os.getppid() == self._parent:
                if selector.select(SECONDS_BETWEEN_LOOKS) and not self._hear():
                    break
                self._look()
        self._end()

    def _hear(self) -> bool:
        chunk = os.read(0, 65536)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for line in whole:
            asked = json.loads(line)
            if "start" in asked:
                self._start(asked["start"], asked["command"], asked["env"], asked["log"])
            elif "watch" in asked:
                self._watched[asked["watch"]] = Watched(asked["pid"])
            elif "write" in asked:
                self._write(asked["write"], asked["text"])
            elif "interrupt" in asked:
                self._send(asked["interrupt"], signal.SIGINT)
            else:
                self._send(asked["kill"], signal.SIGKILL)
        return bool(chunk)

    def _start(self, name: str, command: list[str], env: dict | None, log: str) -> None:
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self._processes[name], self._logs[name] = process, log
        self._emit("started", name, pid=process.pid)

    def _write(self, name: str, text: str) -> None:
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)

    def _send(self, name: str, number: int) -> None:
        if name in self._watched:
            self._watched[name].send(number)
        elif name in self._processes and number == signal.SIGKILL:
            _signal(self._processes[name], number)
        elif name in self._processes:
            os.kill(self._processes[name].pid, number)

    def _look(self) -> None:
        """Hear of processes that ended, that somebody froze, and that woke up again."""
        for name, process in list(self._processes.items()):
            wanted = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
            pid, status = os.waitpid(process.pid, wanted)
            if not pid:
                continue
            if os.WIFSTOPPED(status):
                self._emit("frozen", name)
            elif os.WIFCONTINUED(status):
                self._emit("woken", name)
            else:
                code = os.waitstatus_to_exitcode(status)
                process.returncode = code
                del self._processes[name]
                _signal(process, signal.SIGKILL)  # what it had started itself
                code = code if code >= 0 else 128 - code
                self._emit("ended", name, code=code, last=last_words(self._logs[name]))
        for name, watched in self._watched.items():
            if watched.has_changed():
                self._emit("frozen" if watched.frozen else "woken", name)

    def _end(self) -> None:
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_END
        while self._processes and time.monotonic() < deadline:
            self._look()
            time.sleep(0.02)
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _emit(self, event: str, name: str, **values) -> None:
        try:
            print(json.dumps({"event": event, "name": name, **values}), flush=True)
        except OSError:  # the kernel is gone, and the end of standard input says so, too
            pass


def last_words(log: str) -> str:
    """Return the end of a log."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - LAST_BYTES))
        return file.read().decode(errors="replace")


class Watched:
    """A process that somebody else has started, and whose end its starter tells.

    Args:
        pid: its process id.
    """

    def __init__(self, pid: int) -> None:
        import psutil  # only where it is needed

        self.frozen = False
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def has_changed(self) -> bool:
        """Look whether it is frozen; say whether that is news."""
        import psutil

        before = self.frozen
        try:
            self.frozen = bool(self._process) and self._process.status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            self.frozen = False
        return self.frozen != before

    def send(self, number: int) -> None:
        """Send it a signal, if it lives."""
        import psutil

        try:
            if self._process:
                self._process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


if __name__ == "__main__":
    # A kernel's interrupt is meant for the kernel: it decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Guardian(sys.argv[1]).run()
