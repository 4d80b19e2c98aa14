"""Stands between a notebook's kernel and horovodrun: passes on, watches, and ends all of it.

A process of its own, because a kernel can be killed: then its end of the pipe closes, and whatever
it had started is ended here. It imports next to nothing, so that a cell starts as fast as a shell's
horovodrun does.

    its standard input     a line of JSON, the `Job`; afterwards `stop`, or the end of the file
    its standard output    a line of JSON for each thing that happens:
        {"event": "started", "pid": 7}                      horovodrun's process
        {"event": "rank", "rank": 0, "pid": 9}              a rank on this host was found
        {"event": "line", "rank": 0, "stream": "stdout", "text": "step 1\\n"}
        {"event": "mark", "rank": 0, "kind": "error", ...}  what a cell's runner reports
        {"event": "said", "text": "..."}                    horovodrun's own words
        {"event": "rank_ended", "rank": 1, "code": 137}     not sent for ranks that ended well
        {"event": "rank_stopped", "rank": 1, "seconds": 3}  it was frozen, and is killed now
        {"event": "ended", "code": 1, "reason": "", "left": []}   the last one
"""

from __future__ import annotations

import base64
import codecs
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

MARK = "\x1e"  # begins what the runner of a cell reports among what the cell prints
SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_FROZEN = 3.0  # a rank that somebody froze gets so long to be woken again
SECONDS_TO_AGREE = 1.0  # other ranks that fail for the same reason get so long to say so
SECONDS_TO_VANISH = 5.0
# Horovod: a rank's lines come as "[1]<stdout>:text", its last one perhaps without an end.
_PREFIX = re.compile(r"\[(\d+)\]<(?:stdout|stderr)>:")
_SHELL = {"Terminated\n", "Killed\n"}  # said by a rank's shell when the rank is ended
_RANK_ENDED = re.compile(r"Process (\d+) exit with status code (-?\d+)\.")


@dataclass(frozen=True)
class Job:
    """What to run and how to end it.

    Attributes:
        command: horovodrun's call.
        size: how many ranks it starts.
        env: its environment.
        cwd: its working directory.
        parent: the kernel's process id.
        patience: seconds that ranks have to end by themselves when they are asked to.
        elastic: whether ranks may end while the job goes on.
        gentle: whether ranks are asked themselves, and may save; else horovodrun ends them.
        timeout: seconds after which all of it is ended; 0: never.
        log_dir: where each rank's output is kept, as `console-rank0.log`; empty: nowhere.
    """

    command: list[str]
    size: int
    env: dict[str, str]
    cwd: str
    parent: int
    patience: float = 2.0
    gentle: bool = False
    elastic: bool = False
    timeout: float = 0.0
    log_dir: str = ""

    def to_json(self) -> str:
        """Return the line that a supervisor reads."""
        return json.dumps(asdict(self))


@dataclass
class Lines:
    """Cut what horovodrun prints into whole lines, each with the rank that it is from, or None."""

    _rest: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def feed(self, chunk: bytes) -> list[tuple[int | None, str]]:
        """Return the lines that are whole now; an empty chunk is the end, and ends the last one."""
        text = self._rest + self._decoder.decode(chunk, final=not chunk)
        *whole, self._rest = re.split(r"(?<=[\n\r])", text)
        if not chunk:
            whole, self._rest = [*whole, self._rest], ""
        return [part for line in whole if line for part in self._parts(line)]

    @staticmethod
    def _parts(line: str) -> list[tuple[int | None, str]]:
        # A killed rank's last line has no end: the next rank's prefix stands right behind it.
        before, *pairs = _PREFIX.split(line)
        parts: list[tuple[int | None, str]] = [(None, before)] if before else []
        for rank, text in zip(pairs[::2], pairs[1::2], strict=True):
            parts.append((int(rank), text if text.endswith(("\n", "\r")) else text + "\n"))
        return parts


class Supervisor:
    """One job's supervision, from its start until nothing of it is left."""

    def __init__(self, job: Job, emit: Callable[..., None]) -> None:
        self.job, self._emit_event = job, emit
        self.reason = ""  # why it is being ended: stopped, timeout, kernel, failed
        self._kill_at = float("inf")
        self._settle_at = float("inf")
        self._family: dict[int, object] = {}  # every process that was seen, by its id
        self._ranks: dict[int, object] = {}
        self._frozen_since: dict[int, float] = {}
        self._logs: dict[int, object] = {}
        self._open = 0  # pipes of horovodrun that have not ended

    def run(self) -> int:
        """Run the job to its end; return horovodrun's exit code."""
        self.started = time.monotonic()
        self.horovodrun = subprocess.Popen(
            self.job.command, env=self.job.env, cwd=self.job.cwd, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.emit("started", pid=self.horovodrun.pid)
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ, self._hear_the_kernel)
            for pipe in (self.horovodrun.stdout, self.horovodrun.stderr):
                selector.register(pipe, selectors.EVENT_READ, self._reader(selector, pipe))
                self._open += 1
            looked = 0.0
            while self._open or self.horovodrun.poll() is None:
                for key, _ in selector.select(SECONDS_BETWEEN_LOOKS):
                    if key.data() is False:
                        selector.unregister(key.fileobj)
                if time.monotonic() - looked >= SECONDS_BETWEEN_LOOKS:
                    self._look()
                    looked = time.monotonic()
        code = self.horovodrun.wait()
        left = self._kill_family()
        for log in self._logs.values():
            log.close()
        self.emit("ended", code=code, reason=self.reason, left=left)
        return code

    def emit(self, event: str, **values) -> None:
        """Tell the kernel; a kernel that is gone ends the job."""
        try:
            self._emit_event(event, **values)
        except OSError:
            self._end("kernel")

    # ---- what is heard --------------------------------------------------------------------------

    def _hear_the_kernel(self) -> bool:
        heard = os.read(0, 4096)
        self._end("stopped" if heard else "kernel")
        return bool(heard)

    def _reader(self, selector: selectors.BaseSelector, pipe) -> Callable[[], bool]:
        lines = Lines()

        def read() -> bool:
            chunk = os.read(pipe.fileno(), 65536)
            for rank, text in lines.feed(chunk):
                self._pass_on(rank, "stdout" if pipe is self.horovodrun.stdout else "stderr", text)
            self._open -= not chunk
            return bool(chunk)

        return read

    def _pass_on(self, rank: int | None, stream: str, text: str) -> None:
        if rank is None:
            ended = _RANK_ENDED.search(text)
            if ended:
                self.emit("rank_ended", rank=int(ended[1]), code=int(ended[2]))
                self._fail()
            else:
                self.emit("said", text=text)
            return
        if stream == "stderr" and text in _SHELL:
            return
        text, _, report = text.partition(MARK)
        if text:
            self.emit("line", rank=rank, stream=stream, text=text)
            self._log(rank, text)
        if report:
            self._hear_a_mark(rank, json.loads(base64.b64decode(report)))

    def _hear_a_mark(self, rank: int, report: dict) -> None:
        self.emit("mark", rank=rank, **report)
        if report["kind"] == "error":
            self._log(rank, "".join(report["traceback"]))
            self._fail()

    def _log(self, rank: int, text: str) -> None:
        if not self.job.log_dir:
            return
        if rank not in self._logs:
            path = Path(self.job.log_dir, f"console-rank{rank}.log")
            self._logs[rank] = open(path, "a", encoding="utf-8", buffering=1)
        self._logs[rank].write(text)

    # ---- what is seen ---------------------------------------------------------------------------

    def _look(self) -> None:
        """Look at the clock, at the kernel, and at every process of the job."""
        now = time.monotonic()
        if os.getppid() != self.job.parent:
            self._end("kernel")
        if self.job.timeout and now - self.started > self.job.timeout:
            self._end("timeout")
        if now >= self._settle_at:
            self._end("failed")
        self._find_family()
        if not self.reason:
            for rank, process in self._ranks.items():
                self._look_at(rank, process, now)
        if now >= self._kill_at:
            self._kill_family()

    def _find_family(self) -> None:
        import psutil  # only now: horovodrun is already under way

        try:
            found = psutil.Process(self.horovodrun.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in found:  # parents come before their children
            self._family.setdefault(process.pid, process)
            try:
                rank = int(process.environ()["HOROVOD_RANK"])
            except (KeyError, ValueError, psutil.Error):
                continue
            known = self._ranks.get(rank)
            # In an elastic job another process may have taken a dead one's place.
            if known is None or not known.is_running():
                self._ranks[rank] = process
                self.emit("rank", rank=rank, pid=process.pid)

    def _look_at(self, rank: int, process, now: float) -> None:
        """End a rank that is frozen: the others would wait for it."""
        import psutil

        try:
            frozen = process.status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            frozen = False
        if not frozen:
            self._frozen_since.pop(rank, None)
        elif now - self._frozen_since.setdefault(rank, now) >= SECONDS_FROZEN:
            self.emit("rank_stopped", rank=rank, seconds=SECONDS_FROZEN)
            self._frozen_since[rank] = float("inf")
            _end_quietly(process.kill)

    # ---- how it ends ----------------------------------------------------------------------------

    def _fail(self) -> None:
        """A rank has failed: others may say why in a moment, then all of it is ended."""
        if self.job.elastic:  # horovodrun and the ranks themselves decide how to go on
            return
        self._settle_at = min(self._settle_at, time.monotonic() + SECONDS_TO_AGREE)

    def _end(self, reason: str) -> None:
        """Ask the ranks to end, once; what is left after the patience is killed."""
        if self.reason:
            return
        self.reason = reason
        self._kill_at = time.monotonic() + self.job.patience
        # Ranks on other hosts can only be reached through horovodrun.
        all_here = len(self._ranks) == self.job.size or self.job.elastic
        asked = self._ranks.values() if self.job.gentle and all_here else [self.horovodrun]
        for process in asked:
            _end_quietly(process.terminate)

    def _kill_family(self) -> list[int]:
        """Kill whatever is left of the job; return the ids of what does not go."""
        import psutil

        self._find_family()
        alive = [process for process in self._family.values() if process.is_running()]
        for process in alive:
            _end_quietly(process.kill)
        if self.horovodrun.poll() is None:
            self.horovodrun.kill()
        _, left = psutil.wait_procs(alive, timeout=SECONDS_TO_VANISH)
        return [process.pid for process in left]


def _end_quietly(end: Callable[[], None]) -> None:
    import psutil

    try:
        end()
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass


def _read_line(descriptor: int) -> bytes:
    """Read one line and not a byte more: the rest is waited for elsewhere."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            break
        line += byte
    return line


def _print_event(event: str, **values) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


if __name__ == "__main__":
    # A kernel's interrupt is meant for the kernel: it decides what becomes of its jobs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Supervisor(Job(**json.loads(_read_line(0))), _print_event).run()
    sys.stdout.close()
