"""A run's files, read while they grow: what each rank has written since the last look."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RunReader:
    """The JSON lines of one run, one file per rank.

    Args:
        log_dir: holds `rank0.jsonl`, `rank1.jsonl`, ...; it need not be there yet.

    Attributes:
        step: optimizer steps that rank 0 has finished.
        total_steps: how many there will be; 0 until rank 0 says so.
        loss: nats per token, of the last training step.
    """

    log_dir: Path
    step: int = 0
    total_steps: int = 0
    loss: float = float("nan")
    _read: dict[Path, int] = field(default_factory=dict)

    def update(self) -> list[dict[str, Any]]:
        """Return the events that have come since the last call, by rank and in order.

        A line that is still being written is left for the next call.
        """
        events: list[dict[str, Any]] = []
        for file in self._files():
            with open(file, "rb") as lines:
                lines.seek(self._read.get(file, 0))
                whole, _, _ = lines.read().rpartition(b"\n")
            if whole:
                self._read[file] = self._read.get(file, 0) + len(whole) + 1
                events += [json.loads(line) for line in whole.splitlines()]
        for event in events:
            self._note(event)
        return events

    def skip_what_is_there(self) -> None:
        """Begin behind what an interrupted run has left in the files."""
        self._read = {file: file.stat().st_size for file in self._files()}

    def _files(self) -> list[Path]:
        return sorted(self.log_dir.glob("rank*.jsonl"), key=_rank_of)

    def _note(self, event: dict[str, Any]) -> None:
        if event["rank"] != 0:
            return
        if event["event"] == "start":
            self.step, self.total_steps = event["step"], event["total_steps"]
        elif event["event"] == "metrics" and event["phase"] == "train":
            self.step, self.loss = event["step"], event["loss"]


def _rank_of(file: Path) -> int:
    digits = file.stem.removeprefix("rank")
    return int(digits) if digits.isdigit() else -1
