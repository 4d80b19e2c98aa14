"""The folder of a run: configuration, description, metrics, logs and checkpoints."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from horovod_lm.utils.config import Config, save_config
from horovod_lm.utils.errors import ConfigError

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

    @classmethod
    def of(cls, config: Config, run_name: str) -> RunFolder:
        """Return the folders of a run, from `config.paths` and the run's name.

        Raises:
            ConfigError: the name cannot be a folder's name.
        """
        is_valid = run_name.isprintable() and 0 < len(run_name.encode()) <= LONGEST_NAME
        if not is_valid or run_name in (".", "..") or set(run_name) & set("/\\"):
            raise ConfigError(
                f"the run name {run_name[:LONGEST_NAME]!r} must be the name of a folder: printable,"
                f" without / or \\, at most {LONGEST_NAME} bytes long"
            )
        paths = config.paths
        folders = (paths.run_dir, paths.checkpoint_dir, paths.log_dir, paths.tensorboard_dir)
        return cls(run_name, *(config.resolve(folder, run_name) for folder in folders))

    def archive_existing_run(self) -> Path | None:
        """Rename the folder of an earlier run. Return its new path; None: there is no such run."""
        if not (self.run_dir / "run.json").exists():
            return None
        numbers = range(1, sys.maxsize)
        free = (self.run_dir.with_name(f"{self.run_dir.name}.{number}") for number in numbers)
        target = next(path for path in free if not path.exists())
        self.run_dir.rename(target)
        return target

    def describe(self, config: Config, world_size: int, devices: str) -> None:
        """Create the folder and write `config.yaml` and `run.json`.

        `run.json` describes every session: command, versions, host and devices of each time that
        the run was started or resumed.

        Raises:
            ConfigError: the folder cannot be written.
        """
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [_VARIABLES.sub(r"\1...", word) for word in sys.argv],
            "host": platform.node(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _PACKAGES},
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
            raise ConfigError(
                f"the run's folder {self.run_dir} cannot be written: {error.strerror}"
            ) from None


def read_sessions(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the sessions in a run's `run.json`, oldest first; none if it cannot be read."""
    try:
        return list(json.loads((Path(run_dir) / "run.json").read_text("utf-8"))["sessions"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def default_run_name(prefix: str = "run") -> str:
    """Return a name for a new run: the prefix and the time to the second."""
    return f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest_run(config: Config) -> str | None:
    """Return the name of the run that was started last; None: there is none."""
    pattern = config.resolve(config.paths.run_dir, "*")
    started = {
        file.parent.name: file.stat().st_mtime
        for file in pattern.parent.glob(f"{pattern.name}/run.json")
    }
    return max(started, key=started.__getitem__, default=None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
