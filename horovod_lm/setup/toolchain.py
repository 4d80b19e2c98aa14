"""What Horovod is built with and for, and what is missing for a build.

The functions that set-up calls before any package is installed need the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from horovod_lm.setup.cuda import Cuda, find_cuda, why_no_gpu
from horovod_lm.setup.patches import HOROVOD_VERSION, patches_digest
from horovod_lm.utils.errors import UserError

NOT_IN_KEY = ("cuda", "why_not")
# A compiler that only accepts the option does not pass.
CPP17_PROGRAM = b"""
#include <string_view>
int main() { if constexpr (sizeof(int) > 1) return std::string_view{"x"}.size(); }
"""


@dataclass(frozen=True)
class Toolchain:
    """Everything that determines what a build contains."""

    horovod: str  # its version
    patches: str  # their digest
    torch: str  # the version that is installed
    python: str  # the Python ABI of the wheel
    platform: str  # operating system and processor
    compiler: str  # the first line of the C++ compiler's --version
    nccl: str | None = None  # the versions of CUDA and NCCL, and the GPU architectures
    cuda: Cuda | None = None  # where CUDA and NCCL are; not part of the key
    why_not: str = ""  # why there is no NCCL, or no GPU for it; not part of the key

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits, different for every toolchain."""
        fields = {name: value for name, value in asdict(self).items() if name not in NOT_IN_KEY}
        described = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    @property
    def summary(self) -> str:
        """The communication libraries in the build, and why NCCL is missing, for a message."""
        reason = f"; {'no GPU for it' if self.nccl else 'without NCCL'}: {self.why_not}"
        nccl = f" and {self.nccl}" if self.nccl else ""
        return f"with Gloo{nccl}{reason if self.why_not else ''}"


def inspect_toolchain(nccl: bool | None = None) -> Toolchain:
    """Inspect what is installed, and decide what the build will contain.

    With `nccl` None, NCCL is included where an NVIDIA driver and a CUDA build of torch are.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"torch cannot be imported ({error}); first run: make setup") from None
    if missing := missing_for_build():
        raise UserError("; ".join(missing))
    torch_cuda = torch.version.cuda
    cuda, why_not = None, "--no-nccl was given" if nccl is False else why_no_gpu(torch_cuda)
    if nccl or not why_not:
        try:
            cuda = find_cuda(torch_cuda)
        except UserError as error:
            if nccl:
                raise
            why_not = str(error)
    return Toolchain(
        horovod=HOROVOD_VERSION,
        patches=patches_digest(),
        torch=torch.__version__,
        python=str(sys.implementation.cache_tag),
        platform=sysconfig.get_platform(),
        compiler=compiler_version(),
        nccl=str(cuda) if cuda else None,
        cuda=cuda,
        why_not=why_not or "",
    )


def missing_for_build(include: str | Path | None = None) -> list[str]:
    """Return what is missing on this system to compile Horovod, one sentence each.

    `include` is the folder for Python's headers; None: this Python's.
    """
    missing = []
    places = [include or sysconfig.get_path("include")]
    places += filter(None, os.environ.get("CPATH", "").split(os.pathsep))
    if not any(Path(place, "Python.h").is_file() for place in places):
        missing.append(
            f"Python's headers are missing ({Path(places[0], 'Python.h')}); on Debian or Ubuntu: "
            "apt-get install python3-dev"
        )
    if shutil.which("make") is None:
        missing.append("no `make` was found; on Debian or Ubuntu: apt-get install build-essential")
    try:
        compiler = find_compiler()
    except UserError as error:
        return [*missing, str(error)]
    # Nothing is written, so that a full disk cannot make this fail.
    command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=CPP17_PROGRAM, capture_output=True).returncode:
        missing.append(
            f"the C++ compiler `{compiler}` does not compile C++17, which torch's headers need; "
            "install a newer one (GCC 9 or later) and name it: make setup CXX=..."
        )
    return missing


def find_compiler() -> str:
    """Return the C++ compiler that CMake will use: $CXX, or the first of c++, g++, clang++."""
    chosen = os.environ.get("CXX", "").split()
    if chosen and not shutil.which(chosen[0]):
        raise UserError(f"CXX names {chosen[0]}, which was not found; install it, or unset CXX")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise UserError(
        "no C++ compiler was found; on Debian or Ubuntu: apt-get install build-essential, on macOS:"
        " xcode-select --install, with conda: conda install -c conda-forge cxx-compiler make"
    )


def compiler_version() -> str:
    """Return the first line of the C++ compiler's --version."""
    printed = subprocess.run([find_compiler(), "--version"], capture_output=True, text=True).stdout
    return printed.strip().partition("\n")[0]


def find_cmake() -> str:
    """Return this environment's CMake if it has one, else the system's."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which("cmake", path=os.pathsep.join(places)) or "cmake"
