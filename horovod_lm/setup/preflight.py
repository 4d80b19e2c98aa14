"""Find what the set-up would fail on later, and say it before anything is downloaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from horovod_lm.setup.toolchain import find_compiler
from horovod_lm.utils.errors import UserError

# Uses what distinguishes C++17, so that a compiler which only knows the flag does not pass.
CPP17_PROGRAM = """
#include <optional>
#include <string_view>
#include <utility>
int main() {
  auto [a, b] = std::pair{1, std::string_view{"x"}};
  if constexpr (sizeof(int) > 1) return std::optional<int>{a}.value() - int(b.size());
}
"""


def missing_modules() -> list[str]:
    """Return a sentence if this Python cannot make virtual environments."""
    if all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        return []
    package = f"python3.{sys.version_info[1]}-venv"
    return [
        f"{sys.executable} cannot make environments; on Debian or Ubuntu: apt-get install {package}"
    ]


def missing_headers(include: Path) -> list[str]:
    """Return a sentence if Python's headers are not in `include`."""
    if (include / "Python.h").is_file():
        return []
    return [
        f"Python's headers are missing ({include / 'Python.h'}), and Horovod is compiled with "
        "them; on Debian or Ubuntu: apt-get install python3-dev"
    ]


def missing_for_compiling() -> list[str]:
    """Return what is missing to compile C++17, one sentence each."""
    missing = []
    if shutil.which("make") is None:
        missing.append("no `make` was found; on Debian or Ubuntu: apt-get install build-essential")
    try:
        compiler = find_compiler()
    except UserError as error:
        return [*missing, str(error)]
    if not compiles_cpp17(compiler):
        missing.append(
            f"the C++ compiler `{compiler}` does not compile C++17, which torch's headers need; "
            "install a newer one (GCC 9 or later) and name it: make setup CXX=..."
        )
    return missing


def compiles_cpp17(compiler: str) -> bool:
    """Return whether `compiler` accepts C++17; nothing is written, so a full disk cannot matter."""
    command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    return (
        subprocess.run(command, input=CPP17_PROGRAM.encode(), capture_output=True).returncode == 0
    )


def missing_rights(folder: Path, fix: str) -> list[str]:
    """Return a sentence if `folder` cannot be written, or cannot be made."""
    place = _existing(folder)
    if os.access(place, os.W_OK | os.X_OK) and place.is_dir():
        return []
    return [f"{folder} cannot be written; choose another folder: {fix}"]


def missing_space(needs: list[tuple[str, Path, float]]) -> list[str]:
    """Return a sentence for each disk that has less free than is needed there.

    Args:
        needs: what needs space, the folder that it will be written to, and how many bytes.
    """
    disks: dict[int, list[tuple[str, Path, float]]] = {}
    for what, folder, needed in needs:
        place = _existing(folder)
        disks.setdefault(place.stat().st_dev, []).append((what, place, needed))
    missing = []
    for on_disk in disks.values():
        place, total = on_disk[0][1], sum(needed for _, _, needed in on_disk)
        free = shutil.disk_usage(place).free
        if free < total:
            parts = ", ".join(f"{needed / 1e9:.1f} GB for {what}" for what, _, needed in on_disk)
            missing.append(
                f"{total / 1e9:.1f} GB are needed on the disk of {place} ({parts}), and "
                f"{free / 1e9:.1f} GB are free; delete files there, or choose folders on another "
                "disk: make setup VENV=... HOROVOD_LM_CACHE=..."
            )
    return missing


def _existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path
