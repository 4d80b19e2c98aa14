"""The processes of a live cluster as the kernel holds them, through their guardian."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

GUARDIAN = "horovod_lm.jupyter.guardian"
SECONDS_TO_END = 8.0


class Processes:
    """Named processes of this host that end with this one, however it ends.

    Args:
        on_end: called with a name and an exit code, in a thread of its own, when one has ended.

    Attributes:
        folder: what they keep on disk.
        pids: process ids by name, of those that live.
        codes: exit codes by name, as a shell gives them, of those that ended.
        frozen: the time since when a process is stopped, by name.
        last: the last words of those that ended, by name.
        lost: why the end of some was not seen, by name.
    """

    def __init__(self, on_end: Callable[[str, int], None]) -> None:
        self._on_end = on_end
        self.folder = Path(tempfile.mkdtemp(prefix="horovod-cluster-"))
        self.pids: dict[str, int] = {}
        self.codes: dict[str, int] = {}
        self.frozen: dict[str, float] = {}
        self.last: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self._begin([sys.executable, "-m", GUARDIAN, str(self.folder)])

    def _begin(self, command: list[str], complaints: IO[str] | None = None) -> None:
        self._names: set[str] = set()
        self._guardian = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
            start_new_session=True,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._hear, daemon=True, name="guardian")
        self._thread.start()

    @property
    def parent(self) -> int:
        """The process id of their parent."""
        return self._guardian.pid

    def start(self, name: str, command: list[str], env: dict[str, str] | None) -> None:
        """Start a process; its output goes to `log(name)`."""
        self._names.add(name)
        self.lost.pop(name, None)
        self.codes.pop(name, None)
        self.pids.pop(name, None)
        self._tell({"start": name, "command": command, "env": env, "log": str(self._log(name))})
        if not self._thread.is_alive():  # the guardian is gone
            self._lose(name)

    def watch(self, name: str, pid: int) -> None:
        """Name a process that one of these has started: it can be killed, and is seen to freeze."""
        self._names.add(name)
        self.pids[name] = pid
        self._tell({"watch": name, "pid": pid})

    def kill(self, name: str) -> None:
        """Kill a process and what it has started."""
        self._tell({"kill": name})

    def interrupt(self, name: str) -> None:
        """Do to a process what Ctrl-C does."""
        self._tell({"interrupt": name})

    def log(self, name: str) -> str:
        """Return what a process wrote past its own streams."""
        path = self._log(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End every process, and return when all are gone."""
        try:
            self._guardian.stdin.close()
        except OSError:
            pass
        try:
            self._guardian.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        self._thread.join()
        self._guardian.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed guardian has left

    def _log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"

    def _tell(self, asked: dict) -> None:
        try:
            self._guardian.stdin.write(json.dumps(asked).encode() + b"\n")
            self._guardian.stdin.flush()
        except (OSError, ValueError):  # the guardian was killed, and they end with it
            pass

    def _hear(self) -> None:
        for line in self._guardian.stdout:
            event = json.loads(line)
            name = event["name"]
            if event["event"] == "started":
                self.pids[name] = event["pid"]
            elif event["event"] == "frozen":
                self.frozen[name] = time.monotonic()
            elif event["event"] == "woken":
                self.frozen.pop(name, None)
            else:
                self.pids.pop(name, None)
                self.frozen.pop(name, None)
                self.last[name] = event["last"]
                self._on_end(name, event["code"])
                self.codes[name] = event["code"]
        for name in self._names - set(self.codes):
            self._lose(name)

    def _lose(self, name: str) -> None:
        """Do what the guardian would have done: it was killed itself."""
        try:
            if name in self.pids:
                os.killpg(self.pids.pop(name), signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.codes[name] = 128 + signal.SIGKILL
