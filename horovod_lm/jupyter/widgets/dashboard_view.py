"""The state of a run, from its files alone: for dashboards and for `TrainingJob.status`."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.training.metrics import PARTS_OF_A_STEP
from horovod_lm.training.run_dir import read_sessions
from horovod_lm.utils.config import load_config
from horovod_lm.utils.errors import ConfigError
from horovod_lm.utils.progress import format_seconds

RECENT_STEPS = 20  # that current speeds and times are the mean of
SILENCE_SECONDS = 10  # after which the table shows that a rank writes nothing
START_SECONDS = 60  # from a run's folder to the first event of its ranks, at most
FIRST_KEY = b'{"event": '
COLUMNS = ("phase", "step", "loss", "learning_rate", "tokens_per_second")


@dataclass
class RankView:
    """The events of one rank, and its process if that runs on this host."""

    rank: int
    pid: int | None = None
    step: int = 0
    last_event_at: float = 0.0  # seconds since 1970
    recent: list[dict[str, float]] = field(default_factory=list)  # training steps

    def mean_seconds(self, part: str) -> float:
        """Return the mean seconds of a part of the recent steps."""
        return sum(one.get(part, 0.0) for one in self.recent) / max(1, len(self.recent))

    def process(self) -> psutil.Process | None:
        """Return the rank's process if it is alive and still a training process."""
        try:
            process = psutil.Process(self.pid) if self.pid else None
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                return None
            # Process ids are reused: another program must not be taken for the rank.
            return process if "horovod_lm" in " ".join(process.cmdline()) else None
        except psutil.Error:
            return None

    def table_row(self, process: psutil.Process | None) -> dict[str, str]:
        """Return the step, milliseconds by phase, memory, and state as text."""
        state, memory = "ended", ""
        if process is not None:
            silence = time.time() - self.last_event_at
            state = f"silent for {silence:.0f} s" if silence > SILENCE_SECONDS else "running"
            try:
                memory = f"{process.memory_info().rss / 2**20:.0f}"
                if process.status() == psutil.STATUS_STOPPED:
                    state = "stopped (SIGSTOP)"
            except psutil.Error:
                state = "ended"
        parts = {
            f"{part.removeprefix('seconds_')} (ms)": f"{1000 * self.mean_seconds(part):.1f}"
            for part in PARTS_OF_A_STEP
        }
        known = {"rank": str(self.rank), "step": str(self.step)}
        return {**known, **parts, "memory (MiB)": memory, "state": state}


class RunView:
    """The state of a run: running or finished, started here or elsewhere.

    Args:
        run_dir: the run's folder.
        log_dir: holds `rank0.jsonl`, `rank1.jsonl` ...; default: `logs` inside the run's folder.
        skip_existing: whether to skip the events of an earlier session of the run.

    Attributes:
        step: optimizer steps that rank 0 has finished.
        total_steps: number of steps of the run; 0 until rank 0 has started.
        loss: nats per token of the last training step.
        rows: the `COLUMNS` of the metrics, as `read_metrics` returns them.
        ranks: the ranks by number.
        entropy: the corpus's exact entropy in nats per token; None: not known.
        unreadable: names of the log files with parts that could not be read.
    """

    def __init__(
        self, run_dir: str | Path, log_dir: Path | None = None, skip_existing: bool = False
    ) -> None:
        self.run_dir = Path(run_dir)
        self.step, self.total_steps, self.loss = 0, 0, float("nan")
        self.rows: list[dict[str, Any]] = []
        self.ranks: dict[int, RankView] = {}
        self.entropy: float | None = None
        self.unreadable: set[str] = set()
        self._log_dir = log_dir or self.run_dir / "logs"
        self._positions = {file: file.stat().st_size for file in self._log_files() if skip_existing}

    def update(self) -> list[dict[str, Any]]:
        """Read the events since the last call, and return them by rank and in order.

        A line that is still being written is left for the next call.
        """
        events: list[dict[str, Any]] = []
        for file in self._log_files():
            try:
                with open(file, "rb") as lines:
                    position = self._positions.get(file, 0)
                    if position > lines.seek(0, os.SEEK_END):  # a new run has replaced the file
                        position = 0
                    lines.seek(position)
                    whole, _, _ = lines.read().rpartition(b"\n")
            except OSError:  # it was deleted, or belongs to another user
                self.unreadable.add(file.name)
                continue
            if whole:
                self._positions[file] = position + len(whole) + 1
                for line in whole.split(b"\n"):
                    events += self._read_line(file.name, line)
        return events

    def _read_line(self, name: str, line: bytes) -> list[dict[str, Any]]:
        """Return the event of a line, or nothing where the line is damaged."""
        start = max(0, line.rfind(FIRST_KEY))
        if start:  # a power cut left a part of a line, and the resumed run continued it
            self.unreadable.add(name)
        try:
            event = json.loads(line[start:])
            numbers = {"rank", "time", "step", "pid", "total_steps", *COLUMNS, *PARTS_OF_A_STEP}
            if any(not isinstance(event.get(key, 0), (int, float)) for key in numbers - {"phase"}):
                raise ValueError("not a number")
            if event["event"] == "metrics" and "loss" not in event:
                raise ValueError("incomplete")
            self._add(event)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.unreadable.add(name)
            return []
        return [event]

    def _log_files(self) -> list[Path]:
        return sorted(self._log_dir.glob("rank*.jsonl"), key=lambda file: (len(file.stem), file))

    def _add(self, event: dict[str, Any]) -> None:
        rank = self.ranks.setdefault(event["rank"], RankView(event["rank"]))
        rank.last_event_at = event["time"]
        if event["event"] == "start":
            rank.pid, rank.step = event["pid"], event["step"]
        elif event["event"] == "metrics" and event["phase"] == "train":
            rank.step = event["step"]
            rank.recent = [*rank.recent[1 - RECENT_STEPS :], event]
        if event["rank"] != 0:
            return
        self.step = rank.step
        if event["event"] == "start":
            self.total_steps = event["total_steps"]
            # A resumed run repeats the steps after its checkpoint.
            self.rows = [row for row in self.rows if row["step"] <= event["step"]]
            self.entropy = self.entropy or entropy_per_token(self.run_dir)
        elif event["event"] == "metrics":
            self.rows.append({name: event[name] for name in COLUMNS if name in event})
            self.loss = event["loss"] if event["phase"] == "train" else self.loss

    @property
    def is_running(self) -> bool:
        """Whether a rank of the run is alive on this host."""
        return bool(self._processes())

    @property
    def is_starting(self) -> bool:
        """Whether the run is so new that its ranks may not have written an event yet."""
        try:
            created_at = (self.run_dir / "run.json").stat().st_mtime
        except OSError:
            return False
        last_event_at = max((rank.last_event_at for rank in self.ranks.values()), default=0.0)
        is_new = last_event_at < created_at and time.time() - created_at < START_SECONDS
        return is_new and self.host == platform.node()

    @property
    def host(self) -> str | None:
        """The host on which the last session was started; None: not known."""
        try:
            return read_sessions(self.run_dir)[-1]["host"]
        except (LookupError, TypeError):
            return None

    def ask_to_stop(self) -> None:
        """Ask every rank on this host to end after its current step; return at once.

        Raises:
            ConfigError: there is no rank.
            psutil.AccessDenied: a rank belongs to another user.
        """
        processes = self._processes()
        if not processes:
            raise ConfigError(f"no rank of {self.run_dir.name} runs on this host: nothing to stop")
        for process in processes.values():
            process.terminate()

    def describe_end(self) -> str:
        """Return how far a run came that does not run on this host, or no longer."""
        if self.host is None:
            return (
                f"{self.run_dir}/run.json is missing or damaged: whether this run trains is unknown"
            )
        if self.host not in (None, platform.node()):
            return f"the ranks are on {self.host}: only what they have written is shown here"
        if self.step >= self.total_steps > 0:
            return f"this run has ended after its last step, {self.step}"
        return f"this run has ended at step {self.step} of {self.total_steps}, before its last one"

    def headline(self) -> str:
        """Return step, loss, perplexity, speed and the remaining time in one line."""
        training = (row for row in reversed(self.rows) if row["phase"] == "train")
        recent = list(islice(training, RECENT_STEPS))
        if not recent:
            return "waiting for the first step"
        loss = recent[0]["loss"]
        speed = sum(row.get("tokens_per_second", 0) for row in recent) / len(recent)
        words = [
            f"step {self.step} of {self.total_steps}",
            f"loss {loss:.4f}",
            f"perplexity {math.exp(min(loss, 700)):,.2f}",
            f"{speed:,.0f} tokens/s",
        ]
        left = self.total_steps - self.step
        if left > 0 and self.is_running:
            seconds = left * sum(map(self.ranks[0].mean_seconds, PARTS_OF_A_STEP))
            words.append(f"about {format_seconds(seconds)} left")
        return "   ".join(words)

    def rank_rows(self) -> list[dict[str, str]]:
        """Return a row for each rank: its step, milliseconds by phase, memory, and state."""
        processes = self._processes()
        return [view.table_row(processes.get(rank)) for rank, view in sorted(self.ranks.items())]

    def _processes(self) -> dict[int, psutil.Process]:
        """Return the processes of the ranks that are alive on this host."""
        if self.host not in (None, platform.node()):
            return {}
        found = {rank: view.process() for rank, view in self.ranks.items()}
        return {rank: process for rank, process in found.items() if process is not None}


def entropy_per_token(run_dir: Path) -> float | None:
    """Return the exact entropy of a run's corpus in nats per token; None: not known.

    Only the entropy of the stories is known; a story's entropy is divided by its tokens.
    """
    try:
        config = load_config(run_dir / "config.yaml")
        metadata = config.resolve(config.data.data_dir) / "metadata.json"
        stories = json.loads(metadata.read_text(encoding="utf-8"))["stories"]
        return stories["entropy_nats_per_story"] / stories["tokens_per_story"]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return None
