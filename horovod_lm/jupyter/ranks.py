"""A horovodrun job as the kernel holds it: started, heard, and ended, through its supervisor."""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import psutil

from horovod_lm.jupyter.outcome import Outcome
from horovod_lm.jupyter.supervisor import Job

_ALL: weakref.WeakSet[Ranks] = weakref.WeakSet()


class Ranks:
    """The processes of one job.

    Args:
        job: what to run.
        outcome: takes in everything that is heard.
        listener: called with each event, in a thread of its own.

    Attributes:
        ended: resolved with the outcome when nothing of the job is left.
    """

    def __init__(
        self, job: Job, outcome: Outcome, listener: Callable[[dict], None] | None = None
    ) -> None:
        self.outcome, self.ended = outcome, Future()
        self._listener = listener
        self._complaints = tempfile.TemporaryFile()
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "horovod_lm.jupyter.supervisor"], env=job.env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints,
            start_new_session=True,
        )  # fmt: skip
        self._tell(job.to_json())
        _ALL.add(self)
        self._thread = threading.Thread(target=self._hear, daemon=True, name="horovodrun")
        self._thread.start()

    def stop(self) -> None:
        """Ask for the end of every rank, and return at once; `ended` says when it is there."""
        self._tell("stop")

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end. Raises TimeoutError when it does not come in time."""
        outcome = self.ended.result(timeout)
        self._thread.join(timeout)
        return outcome

    def _tell(self, line: str) -> None:
        try:
            self._supervisor.stdin.write(line.encode() + b"\n")
            self._supervisor.stdin.flush()
        except (OSError, ValueError):  # it is already over
            pass

    def _hear(self) -> None:
        for line in self._supervisor.stdout:
            event = json.loads(line)
            self.outcome.add(event)
            if self._listener is not None:
                self._listener(event)
        self._supervisor.wait()
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            try:
                pipe.close()
            except OSError:
                pass
        if self.outcome.code is None:
            self._end_without_supervisor()
        self._complaints.close()
        self.ended.set_result(self.outcome)

    def _end_without_supervisor(self) -> None:
        """The supervisor itself was killed: end what it had started."""
        self._complaints.seek(0)
        why = self._complaints.read().decode(errors="replace").strip().splitlines()
        left = end_tree(self.outcome.launcher)
        self.outcome.add({"event": "said", "text": why[-1] if why else "its supervisor was killed"})
        ended = {"event": "ended", "code": -1, "reason": "failed", "left": left}
        self.outcome.add(ended)
        if self._listener is not None:
            self._listener(ended)


def end_tree(pid: int | None, patience: float = 5.0) -> list[int]:
    """Kill a process and all that it has started; return the ids of what does not go."""
    try:
        launcher = psutil.Process(pid) if pid else None
        family = [*launcher.children(recursive=True), launcher] if launcher else []
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    _, left = psutil.wait_procs(family, timeout=patience)
    return [process.pid for process in left]


def follow(job: Job, outcome: Outcome, show: Callable[[dict], None]) -> None:
    """Run a job to its end and show its events as they come, in the thread that calls.

    Raises:
        KeyboardInterrupt: again, once every rank has ended and all that was printed is shown.
    """
    events: queue.SimpleQueue[dict] = queue.SimpleQueue()
    running = Ranks(job, outcome, events.put)
    interrupt: KeyboardInterrupt | None = None
    while running.outcome.code is None or not events.empty():
        try:
            show(events.get())
        except KeyboardInterrupt as error:
            if interrupt is not None:
                raise  # asked twice: the supervisor ends the ranks without us
            interrupt = error
            running.stop()
    running.wait()
    if interrupt is not None:
        raise interrupt


@atexit.register
def _end_all() -> None:
    """Leave nothing behind when the kernel ends in the ordinary way."""
    running = [one for one in _ALL if not one.ended.done()]
    for one in running:
        one.stop()
    for one in running:
        one.wait(20)
