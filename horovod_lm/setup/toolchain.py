"""What Horovod is built with and for; its key names the build."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from horovod_lm.setup.cuda import Cuda, find_cuda, why_no_gpu
from horovod_lm.setup.patches import HOROVOD_VERSION, patches_digest
from horovod_lm.utils.errors import UserError

# What Horovod's setup.py imports, and what Horovod imports when it runs.
NEEDED_MODULES = "cloudpickle numpy packaging psutil setuptools wheel yaml".split()
NOT_IN_KEY = ("cuda", "why_not")


@dataclass(frozen=True)
class Toolchain:
    """Everything that decides what a build contains.

    Attributes:
        horovod: the version of Horovod.
        patches: the digest of the patches.
        torch: the version of the torch that is installed.
        python: which Python's binary interface the wheel is for.
        platform: operating system and processor.
        compiler: the first line of the C++ compiler's --version.
        mpi: the first line of mpirun's --version, or None for a build without MPI.
        nccl: the versions of CUDA and NCCL and the GPU architectures, or None for a build without
            NCCL.
        cuda: where they are; not part of the key.
        why_not: why there is no NCCL, or no GPU for it; not part of the key.
    """

    horovod: str
    patches: str
    torch: str
    python: str
    platform: str
    compiler: str
    mpi: str | None = None
    nccl: str | None = None
    cuda: Cuda | None = field(default=None, compare=False)
    why_not: str = field(default="", compare=False)

    @property
    def described(self) -> dict[str, str | None]:
        """What decides the build."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_KEY}

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits, different for every toolchain."""
        described = json.dumps(self.described, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    @property
    def features(self) -> list[str]:
        """What the build can communicate with."""
        return ["gloo"] + ["mpi"] * (self.mpi is not None) + ["nccl"] * (self.nccl is not None)

    @property
    def summary(self) -> str:
        """What is built in, and why NCCL is not, for a person."""
        parts = ["Gloo", *(["MPI"] if self.mpi else []), *([self.nccl] if self.nccl else [])]
        reason = f"; {'no GPU for it' if self.nccl else 'without NCCL'}: {self.why_not}"
        return f"with {' and '.join(parts)}{reason if self.why_not else ''}"


def inspect_toolchain(mpi: bool = False, nccl: bool | None = None) -> Toolchain:
    """Look at what is installed, and decide what the build will contain.

    Args:
        mpi: build MPI in beside Gloo.
        nccl: build NCCL in; None means where NVIDIA's driver and a CUDA build of torch are.

    Raises:
        UserError: something that the build needs, or that was asked for, is not here.
    """
    torch_version, torch_cuda = _installed_torch()
    if mpi and not (shutil.which("mpicxx") and shutil.which("mpirun")):
        raise UserError(
            "--mpi needs MPI's `mpicxx` and `mpirun` on PATH; on Debian or Ubuntu: "
            "apt-get install libopenmpi-dev openmpi-bin"
        )
    _check_what_the_build_needs()
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
        torch=torch_version,
        python=sys.implementation.cache_tag,
        platform=sysconfig.get_platform(),
        compiler=describe_compiler(),
        mpi=_first_line("mpirun", "--version") if mpi else None,
        nccl=str(cuda) if cuda else None,
        cuda=cuda,
        why_not=why_not or "",
    )


def find_compiler() -> str:
    """Return the C++ compiler that CMake will use: $CXX, or the first of c++, g++, clang++.

    Raises:
        UserError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise UserError(
        "no C++ compiler was found; on Debian or Ubuntu: apt-get install build-essential, on macOS:"
        " xcode-select --install, with conda: conda install -c conda-forge cxx-compiler make"
    )


def describe_compiler() -> str:
    """Return the first line of the C++ compiler's --version.

    Raises:
        UserError: there is none.
    """
    return _first_line(find_compiler(), "--version")


def find_cmake() -> str:
    """Return this environment's CMake if it has one, else the system's.

    Raises:
        UserError: there is none.
    """
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    found = shutil.which("cmake", path=os.pathsep.join(places))
    if found is None:
        raise UserError(f"no CMake was found; install it: {sys.executable} -m pip install cmake")
    return found


def _installed_torch() -> tuple[str, str | None]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"torch cannot be imported ({error}); first run: make setup") from None
    return torch.__version__, torch.version.cuda


def _check_what_the_build_needs() -> None:
    missing = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the build needs {', '.join(missing)}, not installed here; "
            f"install what the project needs: {sys.executable} -m pip install -e ."
        )
    places = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(place, "Python.h").is_file() for place in places if place):
        raise UserError(
            "Python's own headers (Python.h) are missing; on Debian or Ubuntu: "
            "apt-get install python3-dev"
        )
    if shutil.which("make") is None:
        raise UserError("no `make` was found; on Debian or Ubuntu: apt-get install build-essential")
    find_compiler()
    find_cmake()


def _first_line(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return said.splitlines()[0] if said else ""
