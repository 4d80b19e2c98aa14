"""What Horovod is built with and for; all of it goes into the name of the build."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from horovod_lm.installation.patches import HOROVOD_VERSION, patches_digest
from horovod_lm.utils.errors import UserError

# What Horovod's setup.py imports, and what Horovod itself imports when it runs.
NEEDED_MODULES = "cffi cloudpickle numpy packaging psutil setuptools wheel yaml".split()


@dataclass(frozen=True)
class Toolchain:
    """Everything that decides what the compiled wheel is.

    Attributes:
        horovod: the version of Horovod.
        patches: the digest of the patches.
        torch: the version of the torch that is installed.
        python: which Python's binary interface the wheel is for.
        platform: operating system and processor.
        compiler: what the C++ compiler calls itself.
        mpi: what MPI calls itself, or None for a build without MPI.
        nccl: the CUDA version of torch, or None for a build without NCCL.
    """

    horovod: str
    patches: str
    torch: str
    python: str
    platform: str
    compiler: str
    mpi: str | None = None
    nccl: str | None = None

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name the build: another toolchain, another key."""
        described = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    @property
    def features(self) -> list[str]:
        """What the build can communicate with."""
        return ["gloo"] + ["mpi"] * (self.mpi is not None) + ["nccl"] * (self.nccl is not None)


def inspect_toolchain(mpi: bool = False, nccl: bool | None = None) -> Toolchain:
    """Look at what is installed, and decide what the build will contain.

    Args:
        mpi: build MPI in beside Gloo.
        nccl: build NCCL in; None means when all that it needs is here.

    Raises:
        UserError: something that the build needs, or that was asked for, is not here.
    """
    torch_version, torch_cuda = _installed_torch()
    lacking = what_nccl_lacks(torch_cuda)
    if nccl and lacking:
        raise UserError(f"--nccl cannot be built here: {'; '.join(lacking)}")
    if mpi and not (shutil.which("mpicxx") and shutil.which("mpirun")):
        raise UserError(
            "--mpi needs MPI's `mpicxx` and `mpirun` on PATH; on Debian or Ubuntu: "
            "apt-get install libopenmpi-dev openmpi-bin"
        )
    _check_what_the_build_needs()
    return Toolchain(
        horovod=HOROVOD_VERSION,
        patches=patches_digest(),
        torch=torch_version,
        python=sys.implementation.cache_tag,
        platform=sysconfig.get_platform(),
        compiler=describe_compiler(),
        mpi=_first_line("mpirun", "--version") if mpi else None,
        nccl=f"CUDA {torch_cuda}" if nccl or (nccl is None and not lacking) else None,
    )


def what_nccl_lacks(torch_cuda: str | None) -> list[str]:
    """What is missing to build NCCL in, a few words each.

    Args:
        torch_cuda: the CUDA version that torch was built for, or None.
    """
    lacking = []
    if torch_cuda is None:
        lacking.append("the torch that is installed is not a CUDA build")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        lacking.append("NVIDIA's compiler `nvcc` is not on PATH")
    chosen = [os.environ.get("HOROVOD_NCCL_INCLUDE"), os.environ.get("HOROVOD_NCCL_HOME")]
    folders = [Path(place) for place in (*chosen, os.environ.get("CONDA_PREFIX")) if place]
    folders += [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders += [Path("/usr"), Path("/usr/local")]
    headers = [folder / name for folder in folders for name in ("nccl.h", "include/nccl.h")]
    if not any(header.is_file() for header in headers):
        lacking.append("nccl.h was not found (install libnccl-dev, or set HOROVOD_NCCL_HOME)")
    return lacking


def find_compiler() -> str:
    """The C++ compiler that CMake will use: $CXX, or the first of c++, g++, clang++.

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
    """What the C++ compiler calls itself, version included.

    Raises:
        UserError: there is none.
    """
    return _first_line(find_compiler(), "--version")


def find_cmake() -> str:
    """CMake, of this environment if it has one, else of the system.

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
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
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
