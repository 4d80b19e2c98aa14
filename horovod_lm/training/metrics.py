"""Metrics of a run: JSON lines of every rank; a CSV table and TensorBoard events of rank 0."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from horovod_lm.utils.errors import DataError

COLUMNS = (
    "phase",  # train or validation
    "epoch",
    "step",  # optimizer steps since the start of the run
    "tokens",  # predicted tokens since the start of the run, on all ranks
    "learning_rate",
    "loss",  # nats per token
    "perplexity",
    "accuracy",  # fraction of tokens predicted correctly
    "tokens_per_second",  # of all ranks together
    "gradient_norm",  # of the averaged gradient, before clipping
    "seconds_data",
    "seconds_forward",
    "seconds_backward",
    "seconds_allreduce",
    "seconds_update",
    "world_size",  # ranks that took the step
    "steps_replayed",  # steps so far that an elastic run lost with a rank and repeated
)
PARTS_OF_A_STEP = tuple(name for name in COLUMNS if name.startswith("seconds_"))


class MetricsRecorder:
    """Writes the metrics of a run as they are measured.

    Each rank writes a `rank0.jsonl`, `rank1.jsonl` ... into `log_dir`. Only rank 0 writes the table
    `metrics.csv` into `run_dir`, and events into `tensorboard_dir`. Rows of the table after
    `resume_step` are dropped, because their steps will be repeated; None: drop all.

    A file that cannot be written, for example on a full disk, is left out with a warning.
    """

    def __init__(
        self,
        run_dir: Path,
        log_dir: Path,
        tensorboard_dir: Path,
        rank: int = 0,
        resume_step: int | None = None,
    ) -> None:
        self._rank = rank
        self._lines_path, self._table_path = log_dir / f"rank{rank}.jsonl", run_dir / "metrics.csv"
        self._events_path = tensorboard_dir
        self._failed: set[Path] = set()
        self._lines = self._try(self._lines_path, lambda: _open_lines(self._lines_path))
        self._table: Any = None
        self._events: Any = None
        if rank == 0:
            self._table = self._try(
                self._table_path, lambda: _open_table(self._table_path, resume_step)
            )
            with contextlib.suppress(ImportError):  # TensorBoard is optional
                self._events = self._try(
                    tensorboard_dir, lambda: _EventFile(tensorboard_dir, resume_step)
                )

    def record(self, phase: str, **values: Any) -> None:
        """Record one measurement: some of `COLUMNS`; other values go to the JSON lines alone."""
        row = {"phase": phase, **values}
        self.event("metrics", **row)
        if self._table is not None:
            self._try(self._table_path, lambda: self._add_row(row))
        if self._events is not None:
            numbers = {
                f"{phase}/{name}": value
                for name, value in values.items()
                if name not in ("epoch", "step") and _is_number(value)
            }
            self._try(self._events_path, lambda: self._events.add(values["step"], numbers))

    def event(self, kind: str, **values: Any) -> None:
        """Append an event, with its time and values, to this rank's JSON lines."""
        line = {"event": kind, "time": round(time.time(), 3), "rank": self._rank, **values}
        self._try(self._lines_path, lambda: self._lines.write(json.dumps(line) + "\n"))

    def close(self) -> None:
        """Close every file."""
        for file in (self._lines, self._table, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # the last line of a file that cannot be written
                    file.close()

    def _add_row(self, row: dict[str, Any]) -> None:
        csv.DictWriter(self._table, COLUMNS, extrasaction="ignore").writerow(row)
        self._table.flush()

    def _try(self, path: Path, write: Callable[[], Any]) -> Any:
        """Return `write()`. Once it has failed, training goes on without these records."""
        if path in self._failed:
            return None
        try:
            return write()
        except OSError as error:
            self._failed.add(path)
            why = f"{path} cannot be written ({error.strerror})"
            print(f"warning: {why}: training goes on without it", file=sys.stderr, flush=True)
            return None


class CPUEvent:
    """A moment, with the methods of `torch.cuda.Event`."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once: the CPU has done the work that it was given."""

    def elapsed_time(self, end: CPUEvent) -> float:
        """Return the milliseconds until `end`."""
        return 1e3 * (end.seconds - self.seconds)


class StepTimer:
    """Measures the parts of a step, in seconds.

    A GPU works asynchronously, so its clock is read by CUDA events: a part lasts from the end of
    the work before it to the end of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._parts: list[tuple[str, Any, Any]] = []  # name, first and last event
        self._started = self._ended = self._now()

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True) if self._on_gpu else CPUEvent()
        event.record()
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds_<name>`."""
        start = self._now()
        yield
        self._parts.append((f"seconds_{name}", start, self._now()))

    def stop(self) -> None:
        """Note the end of the step."""
        self._ended = self._now()

    def wait(self) -> tuple[float, dict[str, float]]:
        """Wait for the end of the step; return its seconds, and those of its parts."""
        self._ended.synchronize()
        seconds = dict.fromkeys(PARTS_OF_A_STEP, 0.0)
        for name, start, end in self._parts:
            seconds[name] += start.elapsed_time(end) / 1e3
        return self._started.elapsed_time(self._ended) / 1e3, seconds


def read_metrics(run_dir: str | Path, phase: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.csv` with numbers converted and empty cells left out.

    Lines that cannot be read, for example after a power cut, are left out with a warning. `phase`
    is `train` or `validation`; None: both. Raises DataError if the file cannot be read.
    """
    path = Path(run_dir) / "metrics.csv"
    try:
        rows, n_damaged = _read_table(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if n_damaged:
        warnings.warn(f"{path}: {n_damaged} damaged lines are left out", stacklevel=2)
    return [row for row in rows if phase in (None, row["phase"])]


def _read_table(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a table, and the number of its damaged lines; no cell has quotes."""
    whole_lines = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", errors="replace")
    header, *lines = [line.split(",") for line in whole_lines.splitlines()] or [[]]
    if not set(header) <= set(COLUMNS):  # damaged
        header = list(COLUMNS)
    rows: list[dict[str, Any]] = []
    for cells in lines:
        with contextlib.suppress(ValueError):
            row = {
                key: value if key == "phase" else _number(value)
                for key, value in zip(header, cells, strict=True)
                if value
            }
            rows += [row] if {"phase", "step"} <= row.keys() else []
    return rows, len(lines) - len(rows)


def _open_table(path: Path, resume_step: int | None) -> Any:
    """Open the table to append, without rows after `resume_step` and incomplete rows."""
    kept: list[dict[str, Any]] = []
    if resume_step is not None and path.exists():
        kept = [row for row in _read_table(path)[0] if row["step"] <= resume_step]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    temporary.replace(path)
    return open(path, "a", encoding="utf-8", newline="")


def _open_lines(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", encoding="utf-8", buffering=1)


class _EventFile:
    """Scalars for TensorBoard. `SummaryWriter` writes in a thread, whose errors are tracebacks."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{time.monotonic_ns()}"
        self._writer = RecordWriter(open(folder / name, "wb"))
        self._write(file_version="brain.Event:2")
        if resume_step is not None:  # TensorBoard hides earlier events after this step
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=resume_step + 1, session_log=start)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
