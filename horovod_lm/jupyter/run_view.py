"""A run as a dashboard shows it: plain numbers and words, from its files alone.

It works on a run that is under way, wherever it was started, and on one of the past.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.jupyter.run_reader import RunReader
from horovod_lm.utils.errors import ConfigError
from horovod_lm.utils.metrics import PARTS_OF_A_STEP
from horovod_lm.utils.progress import format_seconds
from horovod_lm.utils.run_folder import read_sessions

RECENT = 20  # steps that "now" is the mean of
SECONDS_OF_SILENCE = 10  # after which a rank's silence is worth a word
SECONDS_TO_START = 60  # from a run's folder to the first word of its ranks, at most


@dataclass
class RankView:
    """What one rank has written, and its process where it runs on this host."""

    rank: int
    pid: int | None = None
    step: int = 0
    heard_at: float = 0.0  # seconds since 1970
    parts: list[dict[str, float]] = field(default_factory=list)

    def seconds(self, part: str) -> float:
        """Mean seconds of a part of the recent steps."""
        return sum(one.get(part, 0.0) for one in self.parts) / max(1, len(self.parts))

    def process(self) -> psutil.Process | None:
        """The rank's process, if it lives and is a training process still."""
        try:
            process = psutil.Process(self.pid) if self.pid else None
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                return None
            # A process id is used again: another program must not be taken for the rank.
            return process if "horovod_lm" in " ".join(process.cmdline()) else None
        except psutil.Error:
            return None


class RunView:
    """Everything that a run has written so far.

    Args:
        run_dir: the run's folder.
        log_dir: where its JSON lines are; default: `logs` inside.

    Attributes:
        rows: measurements, as `read_metrics` gives them.
        ranks: by number.
        floor: the corpus's exact entropy in nats per token, where it is known.
        stories: the last comparison of whole stories with their entropy, if there was one.
    """

    def __init__(self, run_dir: str | Path, log_dir: str | Path | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.rows: list[dict[str, Any]] = []
        self.ranks: dict[int, RankView] = {}
        self.floor: float | None = None
        self.stories: dict[str, float] | None = None
        self._reader = RunReader(Path(log_dir or self.run_dir / "logs"))

    def update(self) -> bool:
        """Read what is new; return whether there was anything."""
        events = self._reader.update()
        for event in events:
            self._take(event)
        return bool(events)

    # ---- how far it is --------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self._reader.step

    @property
    def total_steps(self) -> int:
        """How many there will be; 0 before training has begun."""
        return self._reader.total_steps

    @property
    def is_running(self) -> bool:
        """Whether a rank of it lives on this host."""
        return self.is_of_this_host and any(rank.process() for rank in self.ranks.values())

    @property
    def is_starting(self) -> bool:
        """Whether its folder is so new that its ranks may not have come to say anything yet."""
        try:
            described_at = (self.run_dir / "run.json").stat().st_mtime
        except OSError:
            return False
        heard_at = max((rank.heard_at for rank in self.ranks.values()), default=0.0)
        is_new = heard_at < described_at and time.time() - described_at < SECONDS_TO_START
        return is_new and self.is_of_this_host

    @property
    def host(self) -> str | None:
        """The machine on which its last session was started; None where the folder does not say."""
        sessions = read_sessions(self.run_dir)
        return sessions[-1]["host"] if sessions else None

    @property
    def is_of_this_host(self) -> bool:
        """Whether the run's processes are, or were, on this machine."""
        return self.host == platform.node()

    def ask_to_stop(self) -> None:
        """Ask every rank on this host to end after the step it is at; return at once.

        Raises:
            ConfigError: there is none.
            psutil.AccessDenied: a rank is another user's.
        """
        found = [rank.process() for rank in self.ranks.values()] if self.is_of_this_host else []
        processes = [process for process in found if process is not None]
        if not processes:
            raise ConfigError(f"no rank of {self.run_dir.name} runs on this host: nothing to stop")
        for process in processes:
            process.terminate()

    def end_in_words(self) -> str:
        """Say how far a run came whose ranks are not, or no longer, to be seen on this host."""
        if self.host is not None and not self.is_of_this_host:
            return f"the ranks are on {self.host}: from here only what they have written is seen"
        if self.step >= self.total_steps > 0:
            return f"this run has ended after its last step, {self.step}"
        return f"this run has ended at step {self.step} of {self.total_steps}, before its last one"

    def headline(self) -> str:
        """Step, loss, perplexity, speed and the time that is left, in a line."""
        # From the end: a long run has far more rows than a line says.
        backwards = (row for row in reversed(self.rows) if row["phase"] == "train")
        recent = list(islice(backwards, RECENT))
        if not recent:
            return "waiting for the first step"
        now = recent[0]
        speed = sum(row["tokens_per_second"] for row in recent) / len(recent)
        words = [
            f"step {self.step} of {self.total_steps}",
            f"loss {now['loss']:.4f}",
            f"perplexity {math.exp(min(now['loss'], 700)):,.2f}",
            f"{speed:,.0f} tokens/s",
        ]
        left = self.total_steps - self.step
        if left > 0 and self.is_running:
            words.append(f"about {format_seconds(left * self._seconds_per_step())} left")
        return "   ".join(words)

    def rank_rows(self, now: float | None = None) -> list[dict[str, str]]:
        """One row for each rank: its step, milliseconds by phase, memory, and state."""
        now = time.time() if now is None else now
        return [self._row(rank, now) for _, rank in sorted(self.ranks.items())]

    # ---- inside ---------------------------------------------------------------------------------

    def _take(self, event: dict[str, Any]) -> None:
        rank = self.ranks.setdefault(event["rank"], RankView(event["rank"]))
        rank.heard_at = event["time"]
        if event["event"] == "start":
            rank.pid, rank.step = event["pid"], event["step"]
            if event["rank"] == 0:
                # A resumed run does these steps again.
                self.rows = [row for row in self.rows if row["step"] <= event["step"]]
                self.floor = self.floor or entropy_per_token(self.run_dir)
        elif event["event"] == "stories":
            self.stories = event
        elif event["event"] == "metrics":
            if event["rank"] == 0:
                self.rows.append(event)
            if event["phase"] == "train":
                rank.step = event["step"]
                rank.parts = [*rank.parts[1 - RECENT :], event]

    def _seconds_per_step(self) -> float:
        return sum(self.ranks[0].seconds(part) for part in PARTS_OF_A_STEP)

    def _row(self, rank: RankView, now: float) -> dict[str, str]:
        process = rank.process() if self.is_of_this_host else None
        silence = now - rank.heard_at
        if process is None:
            state, memory = "ended", ""
        else:
            memory = _memory(process)
            frozen = process.status() == psutil.STATUS_STOPPED
            silent = f"silent for {silence:.0f} s" if silence > SECONDS_OF_SILENCE else "running"
            state = "stopped (SIGSTOP)" if frozen else silent
        parts = {
            f"{part.removeprefix('seconds_')} (ms)": f"{1000 * rank.seconds(part):.1f}"
            for part in PARTS_OF_A_STEP
        }
        return {"rank": str(rank.rank), "step": str(rank.step), **parts, "memory (MiB)": memory,
                "state": state}  # fmt: skip


def open_run(path: str | Path) -> RunView:
    """Return the view of a run of the past, or of one that was started elsewhere.

    Raises:
        ConfigError: the folder holds no run.
    """
    view = RunView(path)
    if not (view.run_dir / "config.yaml").is_file():
        raise ConfigError(f"{path} is not a run: it holds no config.yaml")
    view.update()
    return view


def entropy_per_token(run_dir: Path) -> float | None:
    """Return the exact entropy of a run's corpus in nats per token, or None where it is not known.

    Only the stories' entropy is; a whole story's is shared out among its tokens.
    """
    from horovod_lm.utils.config import load_config

    try:
        config = load_config(run_dir / "config.yaml")
        metadata = config.resolve(config.data.data_dir) / "metadata.json"
        stories = json.loads(metadata.read_text(encoding="utf-8"))["stories"]
    except (OSError, ValueError, KeyError):
        return None
    return stories["entropy_nats_per_story"] / stories["tokens_per_story"]


def _memory(process: psutil.Process) -> str:
    try:
        return f"{process.memory_info().rss / 2**20:.0f}"
    except psutil.Error:
        return ""
