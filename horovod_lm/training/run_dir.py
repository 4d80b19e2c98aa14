"""The folder of a run: configuration, description, metrics, logs and checkpoints."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from horovod_lm.training.checkpoint import find_checkpoints
from horovod_lm.utils.config import RUN_NAME, Config, save_config
from horovod_lm.utils.errors import ConfigError
from horovod_lm.utils.machine import package_version

LONGEST_NAME = 200  # bytes; file systems allow 255, and an archived run has a number as well
_VARIABLES = re.compile("(=.*environment|environment.*?=).*", re.DOTALL)  # may be secret
_PACKAGES = ("horovod_lm", "torch", "horovod", "numpy", "tokenizers", "pydantic")


@dataclass(frozen=True)
class RunFolder:
    """The folders of a run, as absolute paths."""

    name: str
    run_dir: Path
    checkpoint_dir: Path
    log_dir: Path
    tensorboard_dir: Path
    config: Config

    @classmethod
    def of(cls, config: Config, run_name: str) -> RunFolder:
        """Return the folders of a run; raise ConfigError if its name cannot be a folder's name."""
        is_valid = run_name.isprintable() and 0 < len(run_name.encode()) <= LONGEST_NAME
        if not is_valid or run_name in (".", "..") or set(run_name) & set("/\\"):
            raise ConfigError(
                f"the run name {run_name[:LONGEST_NAME]!r} must be the name of a folder: printable,"
                f" without / or \\, at most {LONGEST_NAME} bytes long"
            )
        run_dir, checkpoint_dir, log_dir, tensorboard_dir = _resolve_paths(config, run_name)
        return cls(run_name, run_dir, checkpoint_dir, log_dir, tensorboard_dir, config)

    def archive_existing_run(self) -> Path | None:
        """Rename the folders of an earlier run to those of the run NAME.1, NAME.2 ...

        Returns the new path of the run's folder, or None if there is no such run.

        Raises:
            ConfigError: the run is being trained, a folder cannot be renamed, or the folder of
                checkpoints is that of another run.
        """
        if not (self.run_dir / "run.json").exists() and not find_checkpoints(self.checkpoint_dir):
            return None
        folders = (self.run_dir, self.checkpoint_dir, self.log_dir, self.tensorboard_dir)
        with lock_run(self):
            for number in itertools.count(1):
                targets = _resolve_paths(self.config, f"{self.name}.{number}")
                if targets[0] == self.run_dir:  # `paths.run_dir` without the run's name
                    targets[0] = self.run_dir.with_name(f"{self.run_dir.name}.{number}")
                moves = {old: new for old, new in zip(folders, targets, strict=True) if old != new}
                if not any(map(os.path.lexists, moves.values())):
                    break
            if self.checkpoint_dir not in moves and find_checkpoints(self.checkpoint_dir):
                raise ConfigError(
                    f"paths.checkpoint_dir {self.checkpoint_dir} has checkpoints of an earlier run:"
                    f" put {RUN_NAME} into it, or delete them"
                )
            for old, new in moves.items():
                self._rename(old, new)
        return targets[0]

    def _rename(self, old: Path, new: Path) -> None:
        try:
            if old.exists():  # else it was inside of another
                new.parent.mkdir(parents=True, exist_ok=True)
                old.rename(new)
        except OSError as error:
            raise ConfigError(
                f"{old} of an earlier run cannot be renamed ({error.strerror}): choose another run"
                " name"
            ) from None

    def describe(self, config: Config, world_size: int, devices: str) -> None:
        """Write `config.yaml` and `run.json`, which has an entry for each start or resumption."""
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [_VARIABLES.sub(r"\1...", word) for word in sys.argv],
            "host": platform.node(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: package_version(name) for name in _PACKAGES},
            "git_commit": _git_commit(config.project_root),
            "world_size": world_size,
            "threads_per_rank": torch.get_num_threads(),
            "devices": devices,
        }
        record = {"name": self.name, "sessions": [*read_sessions(self.run_dir), session]}
        path = self.run_dir / "run.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_config(config, self.run_dir / "config.yaml")
            temporary.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            temporary.replace(path)  # atomic: earlier sessions are never lost
        except OSError as error:
            raise _cannot_be_written(self.run_dir, error) from None


def _resolve_paths(config: Config, run_name: str) -> list[Path]:
    """Return the folders of a run, in the order of `RunFolder`'s fields."""
    paths = config.paths
    folders = (paths.run_dir, paths.checkpoint_dir, paths.log_dir, paths.tensorboard_dir)
    return [config.resolve(folder, run_name) for folder in folders]


@contextmanager
def lock_run(run: RunFolder) -> Iterator[None]:
    """Keep other processes from writing a run and its checkpoints, or raise ConfigError.

    Other hosts see the lock if their shared disk supports POSIX locks; a disk without locks is not
    locked. The system releases the lock when the process ends, however it ends.
    """
    with ExitStack() as files:
        # Both, because `paths` may give two runs the same checkpoints.
        for folder in (run.run_dir, run.checkpoint_dir):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise _cannot_be_written(folder, error) from None
            files.callback(os.close, file)
            _lock(file, folder)
        yield


def _lock(file: int, folder: Path) -> None:
    try:
        # Not `flock`, whose locks forked processes keep.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a disk without locks
        owner = os.read(file, 500).decode(errors="replace")
        raise ConfigError(
            f"another run trains in {folder} ({owner}): wait for its end, stop it, or choose"
            " another run name"
        ) from None
    owner = f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}"
    with suppress(OSError):  # the disk is full
        os.ftruncate(file, 0)
        os.pwrite(file, owner.encode(), 0)


def _cannot_be_written(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the run's folder {folder} cannot be written: {error.strerror}")


def read_sessions(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the sessions in a run's `run.json`, oldest first; none if it cannot be read."""
    try:
        return list(json.loads((Path(run_dir) / "run.json").read_text("utf-8"))["sessions"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def default_run_name(prefix: str = "run") -> str:
    """Return a name for a new run: the prefix, the time, and four random digits."""
    return f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def newest_run(config: Config) -> str | None:
    """Return the name of the run that was started last; None: there is none."""
    pattern = config.resolve(config.paths.run_dir, "*")
    started = {
        file.parent.name: file.stat().st_mtime
        for file in pattern.parent.glob(f"{pattern.name}/run.json")
    }
    return max(started, key=started.__getitem__, default=None)


def _git_commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
