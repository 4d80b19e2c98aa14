"""What Horovod's GPU operations are built with: CUDA's compiler, and NCCL.

torch from PyPI brings NCCL with its headers, but no compiler. For CUDA 13 and later NVIDIA's
compiler is on PyPI too, in four packages that are combined here into a folder of links; for CUDA
12 it has to be installed on the system.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from horovod_lm.setup.steps import run_pip
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.machine import driver_cuda, has_gpu_driver

COMPILER_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl".split()
OLDEST_ON_PYPI = 13  # the first major version of CUDA whose nvcc PyPI has
# Where there is no GPU: those that torch's own packages support.
COMMON_ARCHITECTURES = "75,80,86,89,90"
NEWER_ARCHITECTURES = ",100,120"  # known to nvcc since 12.8
SYSTEM_CUDA, SYSTEM_FOLDERS = "/usr/local/cuda", ("/usr/local", "/usr")


@dataclass(frozen=True)
class Cuda:
    """The compiler and the libraries of a build with NCCL.

    Attributes:
        release: the version of CUDA's compiler, for example "13.0".
        nccl: the version of NCCL.
        architectures: the compute capabilities to compile for, for example "80,90".
        toolkit: the folder of the system's CUDA toolkit; None: the compiler comes from PyPI.
        nccl_home: the folder with NCCL's include and lib.
    """

    release: str
    nccl: str
    architectures: str
    toolkit: Path | None
    nccl_home: Path

    def __str__(self) -> str:
        return f"CUDA {self.release}, NCCL {self.nccl}, GPU architectures {self.architectures}"


def why_no_gpu(torch_cuda: str | None) -> str | None:
    """Return why torch, built for this version of CUDA or None, finds no GPU here; None: it may."""
    if not has_gpu_driver():
        return "no NVIDIA driver was found"
    if torch_cuda is None:
        return "the torch that is installed is a CPU build"
    supported = driver_cuda()
    if supported is not None and supported[0] < numbers(torch_cuda)[0]:
        return (
            f"NVIDIA's driver supports CUDA {supported[0]}.{supported[1]}, and torch needs CUDA"
            f" {torch_cuda}: install a newer driver"
        )
    return None


def find_cuda(torch_cuda: str | None) -> Cuda:
    """Find what a build with NCCL needs for a torch of this version of CUDA; install nothing.

    Raises:
        UserError: something is missing; the sentence says what to install.
    """
    if torch_cuda is None:
        raise UserError("NCCL needs a CUDA build of torch, and the one installed is a CPU build")
    on_pypi = numbers(torch_cuda)[0] >= OLDEST_ON_PYPI
    found = find_toolkit(torch_cuda, same_minor=on_pypi)
    if found is None and not on_pypi:
        raise UserError(
            f"NCCL needs the compiler of CUDA {torch_cuda}, which PyPI does not have: install"
            f" NVIDIA's CUDA toolkit {torch_cuda}, and name its folder in CUDA_HOME"
        )
    toolkit, release = found or (None, torch_cuda)
    # HOROVOD_NCCL_HOME, then torch's own NCCL, then conda's and the system's.
    chosen, conda = (os.environ.get(name) for name in ("HOROVOD_NCCL_HOME", "CONDA_PREFIX"))
    homes = [chosen, *(folder / "nccl" for folder in _nvidia()), conda, *SYSTEM_FOLDERS]
    headers = (Path(home, "include", "nccl.h") for home in homes if home)
    header = next((header for header in headers if header.is_file()), None)
    if header is None:
        raise UserError(
            "NCCL's header nccl.h was not found; install the package nvidia-nccl of torch's CUDA"
            " version, or name the folder with include/nccl.h in HOROVOD_NCCL_HOME"
        )
    text = header.read_text(encoding="utf-8")
    parts = re.findall(r"^#define NCCL_(?:MAJOR|MINOR|PATCH) (\d+)", text, re.MULTILINE)
    return Cuda(release, ".".join(parts), gpu_architectures(release), toolkit, header.parents[1])


def find_toolkit(torch_cuda: str, same_minor: bool) -> tuple[Path, str] | None:
    """Return the folder and version of the system's toolkit that fits torch's CUDA, or None."""
    homes = [os.environ.get(name) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH")]
    compilers = [shutil.which(str(Path(home, "bin/nvcc"))) for home in homes if home]
    compilers += [shutil.which("nvcc"), shutil.which(f"{SYSTEM_CUDA}/bin/nvcc")]
    for nvcc in filter(None, compilers):
        # nvcc on PATH may be a link or a wrapper script; nvcc itself prints its own folder.
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        top = re.search(r"^#\$ TOP=(.+)$", _output(command), re.MULTILINE)
        release = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
        if top is None or release is None:
            continue
        home = Path(top[1].strip()).resolve()
        same = slice(None) if same_minor else slice(1)
        if numbers(release[1])[same] == numbers(torch_cuda)[same]:
            if (home / "include" / "cuda_runtime.h").is_file():
                return home, release[1]
    return None


def gpu_architectures(release: str) -> str:
    """Return the compute capabilities of this machine's GPUs, or the common ones without a GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = set(re.findall(r"^(\d+)\.(\d+)$", _output(command), re.MULTILINE))
    if found:
        return ",".join(sorted((major + minor for major, minor in found), key=int))
    return COMMON_ARCHITECTURES + NEWER_ARCHITECTURES * (numbers(release) >= (12, 8))


def build_variables(cuda: Cuda, folder: Path) -> dict[str, str]:
    """Return the environment variables for a build with NCCL; install the compiler if necessary.

    `folder` gets folders of links, which must exist until the build is done.

    Raises:
        UserError: pip cannot install the compiler.
    """
    home = cuda.toolkit or link_compiler(cuda.release, folder / "cuda")
    nccl = folder / "nccl"
    (nccl / "lib").mkdir(parents=True)
    (nccl / "include").symlink_to(cuda.nccl_home / "include")
    for library in sorted(cuda.nccl_home.glob("lib*/libnccl.so.2"))[:1]:
        (nccl / "lib" / "libnccl.so").symlink_to(library)
    return {
        "CUDA_HOME": str(home),
        "HOROVOD_CUDA_HOME": str(home),
        "HOROVOD_NCCL_HOME": str(nccl),
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_BUILD_CUDA_CC_LIST": cuda.architectures,
        "PATH": os.pathsep.join([f"{home}/bin", os.environ.get("PATH", os.defpath)]),
    }


def link_compiler(release: str, home: Path) -> Path:
    """Make a toolkit of links to CUDA's compiler from PyPI at `home`, and return it.

    The packages have no lib64, and no names of libraries without a version, for the linker.

    Raises:
        UserError: pip cannot install the packages.
    """
    major = release.split(".")[0]
    if not any(_is_compiler(place / f"cu{major}", release) for place in _nvidia()):
        print(f"installing the compiler of CUDA {release} from PyPI (about 100 MB)", flush=True)
        packages = [f"{name}=={release}.*" for name in COMPILER_PACKAGES]
        if why := run_pip("install", *packages):
            raise UserError(
                f"pip could not install the compiler of CUDA {release} ({why}):"
                " run this again with a network, or install NVIDIA's CUDA toolkit"
                f" {release} and name its folder in CUDA_HOME"
            )
    places = [place / f"cu{major}" for place in _nvidia()]
    toolkit = next(place for place in places if _is_compiler(place, release))
    for name, links in (("bin", "bin"), ("include", "include"), ("lib", "lib64")):
        (home / links).mkdir(parents=True)
        for child in (toolkit / name).iterdir():
            (home / links / child.name).symlink_to(child)
            plain = home / links / re.sub(r"\.so\.[0-9.]+$", ".so", child.name)
            if not plain.exists():
                plain.symlink_to(child)
    (home / "lib").symlink_to("lib64")
    (home / "nvvm").symlink_to(toolkit / "nvvm")
    return home


def _is_compiler(toolkit: Path, release: str) -> bool:
    return (toolkit / "nvvm").is_dir() and f"release {release}," in _output(
        [str(toolkit / "bin" / "nvcc"), "--version"]
    )


def _nvidia() -> list[Path]:
    """Return the folders of NVIDIA's packages in this environment."""
    importlib.invalidate_caches()
    found = importlib.util.find_spec("nvidia")  # a namespace package: found again, not cached
    return [Path(place) for place in (found and found.submodule_search_locations) or []]


def numbers(version: str) -> tuple[int, ...]:
    """Return the major and the minor number of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _output(command: list[str]) -> str:
    """Return what a command prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""
