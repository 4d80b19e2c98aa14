"""The build of torch that set-up installs: CUDA where NVIDIA's driver is installed, else CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

from horovod_lm.setup.steps import pip_command
from horovod_lm.utils.machine import has_gpu_driver

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Measured with torch 2.13.0: bytes in the environment, and bytes that pip downloads. pip keeps a
# whole download in its temporary folder while it installs, and a copy in its cache.
BYTES_FOR_TORCH = {"CPU": (0.9e9, 0.2e9), "CUDA": (4.8e9, 2.7e9)}


@dataclass(frozen=True)
class TorchBuild:
    """A build of torch.

    Attributes:
        version: such as 2.13.0+cpu.
        kind: "CPU" or "CUDA".
        options: of `pip install`; only torch comes from the index that they name.
        remark: a sentence for the user where the build is not the expected one, or "".
    """

    version: str
    kind: Literal["CPU", "CUDA"]
    options: Sequence[str] = ()
    remark: str = ""

    def __str__(self) -> str:
        gigabytes = BYTES_FOR_TORCH[self.kind][1] / 1e9
        return f"torch {self.version}, {self.kind} build, {gigabytes:.1f} GB to download"


def choose_torch(python: Path, pin: str) -> TorchBuild:
    """Choose the build by the driver and the index, which TORCH_INDEX_URL may name.

    Args:
        python: the environment's interpreter.
        pin: the version of torch.
    """
    default = "" if has_gpu_driver() or sys.platform != "linux" else CPU_INDEX
    index = os.environ.get("TORCH_INDEX_URL") or default
    options = ["--no-deps", "--extra-index-url", index] if index and answers(index) else []
    version = available_build(python, pin, options[1:])
    kind: Literal["CPU", "CUDA"] = "CUDA"
    if "+cpu" in version or sys.platform != "linux":
        kind = "CPU"
    build = TorchBuild(version, kind, options)
    other = "for another index: make setup TORCH_INDEX_URL=..."
    if index and not options:
        remark = f"{index} does not answer, and pip's own index has {build}; {other}"
    elif has_gpu_driver() and kind == "CPU":
        remark = f"NVIDIA's driver is installed, but pip's index has only {build}; {other}"
    else:
        return build
    return TorchBuild(version, kind, options, remark)


def available_build(python: Path, pin: str, options: Sequence[str]) -> str:
    """Return the build of the pinned torch that pip would install, such as 2.13.0+cpu.

    Without a local version after the plus it is PyPI's, which is built with CUDA on Linux. That is
    also the answer when the index cannot be asked.
    """
    command = pip_command("index", "versions", "torch", *options, python=python)
    printed = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    found = re.search(rf"(?<![\w.]){re.escape(pin)}(\+[\w.]+)?(?![\w.])", printed)
    return found.group() if found else pin


def answers(index: str) -> bool:
    """Return whether a package index that has torch answers within a few seconds."""
    try:
        with urlopen(f"{index.rstrip('/')}/torch/", timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False
