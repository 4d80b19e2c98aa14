"""Make a Horovod wheel: fetch the source, patch it, compile it, try it, keep it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from horovod_lm.setup.cuda import build_variables
from horovod_lm.setup.patches import HOROVOD_VERSION, SDIST_SHA256, apply_patches
from horovod_lm.setup.progress import run_with_progress
from horovod_lm.setup.toolchain import Toolchain, find_cmake
from horovod_lm.setup.trial import (
    TrialError,
    environment_without_horovod,
    time_allreduce,
    try_one_rank,
)
from horovod_lm.utils.cli import command
from horovod_lm.utils.errors import UserError, last_line
from horovod_lm.utils.machine import available_cores, container_memory

BYTES_PER_COMPILER = 1.5e9  # what one compiler may hold while it reads torch's headers


def kept_wheel(cache: Path, key: str) -> Path | None:
    """Return the wheel of an earlier build with this key, or None."""
    return next((cache / "wheels" / key).glob("horovod-*.whl"), None)


def build_wheel(toolchain: Toolchain, cache: Path, jobs: int) -> Path:
    """Build the wheel and put it in the cache, which never holds half of one.

    Everything happens in a temporary folder beside the final place; the last step renames it.

    Raises:
        UserError: the source cannot be had, does not compile, or the result does not work.
    """
    source = fetch_source(cache)
    for stale in cache.glob("building-*"):  # of a killed build: nobody else holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as folder:
        wheel = compile_wheel(toolchain, source, Path(folder), cache / "logs", jobs)
        finished = Path(folder) / "finished"
        finished.mkdir()
        wheel.rename(finished / wheel.name)
        (finished / "toolchain.json").write_text(json.dumps(toolchain.described, indent=2) + "\n")
        place = cache / "wheels" / toolchain.key
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        finished.rename(place)
    return place / wheel.name


def build_into(toolchain: Toolchain, target: Path, source: Path, jobs: int) -> None:
    """Build Horovod and unpack it into a folder for PYTHONPATH; install nothing.

    Args:
        toolchain: what to build.
        target: the folder; an earlier build in it is replaced (see `check_target`).
        source: Horovod's source distribution.
        jobs: how many compilers run at once.

    Raises:
        UserError: the source is another one, does not compile, or the result does not work.
    """
    check_source(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as folder:
        compile_wheel(toolchain, source, Path(folder), target.parent, jobs)
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / "unpacked").rename(target)


def check_target(target: Path) -> None:
    """Check that a folder is new or empty, or holds an earlier build.

    Raises:
        UserError: it holds something else.
    """
    ours = {target / "horovod", *target.glob("horovod-*.dist-info")}
    if target.exists() and not (target.is_dir() and ours.issuperset(target.iterdir())):
        raise UserError(f"{target} is not empty and not a build of Horovod; name a new folder")


def fetch_source(cache: Path) -> Path:
    """Return the source distribution, from the cache or pip's index, after a check of its hash.

    Raises:
        UserError: it cannot be had, or is not the file that was released.
    """
    kept = cache / "sdist" / f"horovod-{HOROVOD_VERSION}.tar.gz"
    if kept.is_file():
        check_source(kept)
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{SDIST_SHA256}\n")
        command = pip_command("download --no-deps --no-binary horovod --no-build-isolation")
        command += ["--require-hashes", "--requirement", str(requirement), "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / kept.name
        if done.returncode != 0 or not fetched.is_file():
            said = last_line(done.stderr or done.stdout)
            raise UserError(
                f"pip could not download horovod {HOROVOD_VERSION} ({said}); "
                f"run this again with a network, or put its source distribution at {kept}"
            )
        check_source(fetched)
        fetched.rename(kept)
    return kept


def check_source(sdist: Path) -> None:
    """Check that a source distribution is, byte for byte, the one that was released.

    Raises:
        UserError: it is another file.
    """
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise UserError(
            f"{sdist} is not horovod {HOROVOD_VERSION} as it was released (its SHA-256 is {found},"
            f" not {SDIST_SHA256}); nothing was built; remove the file and run this again"
        )


def compile_wheel(toolchain: Toolchain, sdist: Path, folder: Path, logs: Path, jobs: int) -> Path:
    """Unpack, patch, compile and try out; every file of it stays inside `folder`.

    Returns:
        The wheel; what it holds is in `folder`/unpacked.

    Raises:
        UserError: with the compiler's errors, what to do, and the log's path.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"horovod-{toolchain.key}.log"
    print(f"building Horovod {HOROVOD_VERSION} for torch {toolchain.torch}, {toolchain.summary}:")
    minutes = 6 if toolchain.nccl else 3.5
    print(
        f"  about {minutes} minutes on two cores, here {jobs} compiler(s); log: {log}", flush=True
    )
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python >= 3.11.4
        archive.extractall(folder)
    source = folder / f"horovod-{HOROVOD_VERSION}"
    apply_patches(source)
    command = pip_command("wheel --verbose --no-deps --no-build-isolation --use-pep517")
    command += ["--wheel-dir", str(folder), str(source)]
    env = build_environment(toolchain, jobs)
    if toolchain.cuda:
        env |= build_variables(toolchain.cuda, folder / "links")
    run_with_progress(command, env=env, log=log, title="Horovod")
    wheel = next(folder.glob("horovod-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    try_out(toolchain, folder / "unpacked")
    return wheel


def build_environment(toolchain: Toolchain, jobs: int) -> dict[str, str]:
    """Return the environment variables that Horovod's setup.py reads.

    Args:
        toolchain: what the build is to contain.
        jobs: how many compilers run at once.
    """
    # A stray HOROVOD_WITH_... of the user's would make a wheel that its key does not describe.
    env = environment_without_horovod() | {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_CPU_OPERATIONS": "GLOO",
        "HOROVOD_WITH_MPI" if toolchain.mpi else "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_LOCAL_VERSION": f"lm.{toolchain.key}",
        "HOROVOD_CMAKE": find_cmake(),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # the bundled Gloo asks for 2.8; CMake 4 refuses
        "CMAKE_GENERATOR": "Unix Makefiles",  # the progress is read from make's percentages
        "MAKEFLAGS": f"-j{jobs}",  # never what is inherited: `make setup` sets it for itself
        "PYTHONUNBUFFERED": "1",
    }
    if toolchain.nccl:
        env["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return env


def try_out(toolchain: Toolchain, folder: Path | None = None) -> None:
    """Check that a build works and contains what it should.

    Args:
        toolchain: what the build must contain.
        folder: an unpacked wheel to try instead of the installed Horovod.

    Raises:
        UserError: it does not.
    """
    try:
        built = try_one_rank(folder)
        lacking = [feature for feature in toolchain.features if not built[feature]]
        if lacking:
            raise TrialError(f"{' and '.join(lacking)} is not in this build")
        if toolchain.nccl:
            time_allreduce(size=4000, folder=folder)
    except TrialError as error:
        raise UserError(
            f"Horovod is built but does not work ({error}); build it again from nothing: "
            + command("horovod_lm.setup.install_horovod", "--force")
        ) from None


def available_jobs() -> int:
    """Return as many compilers as there are cores, but no more than memory holds."""
    import psutil

    limits = [psutil.virtual_memory().available, container_memory()]
    memory = min(limit for limit in limits if limit is not None)
    return max(1, min(available_cores(), int(memory // BYTES_PER_COMPILER)))


def pip_command(arguments: str) -> list[str]:
    """Return a call of this environment's pip."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    return [*pip, *arguments.split()]
