"""What the set-up would fail on later, found and said before anything starts."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from horovod_lm.installation.bootstrap import OLDEST_PYTHON
from horovod_lm.installation.toolchain import find_compiler
from horovod_lm.utils.errors import UserError

BYTES_FOR_ENVIRONMENT = 3e9  # measured: 1.7 GB installed, and as much again while unpacking
BYTES_FOR_BUILD = 5e8  # measured: Horovod's build folder grows to 0.2 GB

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


def missing_for_environment(venv: Path, build_cache: Path) -> list[str]:
    """What is missing to make a new environment at `venv`, one sentence each."""
    missing = []
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        missing.append(
            "this Python cannot make environments; on Debian or Ubuntu: "
            f"apt-get install python3.{sys.version_info[1]}-venv"
        )
    missing += _missing_headers(Path(sysconfig.get_path("include")))
    missing += missing_for_compiling()
    missing += missing_space("the environment", venv, BYTES_FOR_ENVIRONMENT, "make setup VENV=...")
    missing += missing_space(
        "Horovod's build", build_cache, BYTES_FOR_BUILD, "HOROVOD_LM_CACHE=..."
    )
    return missing


def missing_in_environment(python: Path, version: tuple[int, ...], include: Path) -> list[str]:
    """What is missing to build in an environment that exists, one sentence each.

    Args:
        python: the environment's Python.
        version: its version.
        include: where its headers should be.
    """
    if version < OLDEST_PYTHON:
        found, wanted = (".".join(map(str, numbers)) for numbers in (version, OLDEST_PYTHON))
        return [f"{python} is Python {found}, and {wanted} or newer is needed"]
    return _missing_headers(include) + missing_for_compiling()


def missing_for_compiling() -> list[str]:
    """What is missing to compile C++17, one sentence each."""
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
    """Whether `compiler` makes a program out of C++17."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cc"
        source.write_text(CPP17_PROGRAM)
        command = [compiler, "-std=c++17", str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def missing_space(what: str, place: Path, needed: float, cure: str) -> list[str]:
    """A sentence if the disk that holds `place` has less than `needed` bytes free."""
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [
        f"{what} needs {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free; "
        f"make room there, or choose another place: {cure}"
    ]


def _missing_headers(include: Path) -> list[str]:
    if (include / "Python.h").is_file():
        return []
    return [
        f"Python's headers are missing ({include / 'Python.h'}), and Horovod is compiled with "
        "them; on Debian or Ubuntu: apt-get install python3-dev"
    ]
