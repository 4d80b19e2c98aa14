"""One run, one folder: configuration as used, circumstances, metrics, logs and checkpoints."""

from __future__ import annotations

import json
import os
import platform
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

_PACKAGES = ("horovod_lm", "torch", "horovod", "numpy", "tokenizers", "pydantic")


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of one run are. All paths are absolute."""

    name: str
    run_dir: Path
    checkpoint_dir: Path
    log_dir: Path
    tensorboard_dir: Path

    @classmethod
    def of(cls, config: Config, run_name: str) -> RunFolder:
        """Return the folders that `config.paths` gives to a run of this name.

        Raises:
            ConfigError: the name is no folder's name.
        """
        if run_name in ("", ".", "..") or set(run_name) & set("/\\\0"):
            raise ConfigError(
                f"the run name {run_name!r} must be the name of a folder, without / or \\"
            )
        paths = config.paths
        folders = (paths.run_dir, paths.checkpoint_dir, paths.log_dir, paths.tensorboard_dir)
        return cls(run_name, *(config.resolve(folder, run_name) for folder in folders))

    def archive_existing_run(self) -> Path | None:
        """Rename the folder of an earlier run of this name, so that nothing of it is lost.

        Returns:
            Its new path, or None where there was no earlier run.
        """
        if not (self.run_dir / "run.json").exists():
            return None
        numbers = range(1, sys.maxsize)
        free = (self.run_dir.with_name(f"{self.run_dir.name}.{number}") for number in numbers)
        target = next(path for path in free if not path.exists())
        self.run_dir.rename(target)
        return target

    def describe(self, config: Config, world_size: int, devices: str) -> None:
        """Make the folder and write `config.yaml` and `run.json`: what was run, where, on what.

        `run.json` tells of every session: each time that ranks began, went on with the run, or
        went on in another number.

        Raises:
            ConfigError: the folder cannot be written.
        """
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
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
            temporary.replace(path)  # a reader, or a death, finds the earlier sessions whole
        except OSError as error:
            raise ConfigError(
                f"the run's folder {self.run_dir} cannot be written: {error.strerror}"
            ) from None


def read_sessions(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return what `run.json` tells of each session of a run, the first one first.

    Empty where there is no such file, or it cannot be read.
    """
    try:
        return json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def default_run_name(prefix: str = "run") -> str:
    """Return a name that no earlier run has: the prefix and the time to the second."""
    return f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest_run(config: Config) -> str | None:
    """Return the name of the run that was started last, or None where there is none."""
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
