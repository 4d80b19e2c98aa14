"""Build a Horovod wheel: fetch the source, patch it, compile it, try it, keep it.

The output goes to a log. A failed build shows the compiler's own error and the fix, if known.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from horovod_lm.setup.cuda import build_variables
from horovod_lm.setup.patches import HOROVOD_VERSION, SDIST_SHA256, apply_patches
from horovod_lm.setup.steps import pip_command, run_pip, run_step
from horovod_lm.setup.toolchain import Toolchain, find_cmake
from horovod_lm.setup.trial import TrialError, environment_without_horovod, try_horovod
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.machine import available_cores, container_memory

BYTES_PER_COMPILER = 1.5e9  # memory of one compiler that reads torch's headers
ERROR = re.compile(
    r"\berror\s*:|CMake Error|\bfatal\s*:|undefined reference|cannot find -l|Error: "
    r"|No space left on device|[Cc]annot allocate memory|Killed"
)
NOISE = re.compile(r"ERROR: Failed|CalledProcessError|^\s*\[\s*\d+%\]|^\s*$")
LINES_SHOWN = 15

# (a pattern of the log, what to do about it); the first that is found is shown.
FIXES = (
    (
        "No space left on device",
        "free some disk space, or put the cache elsewhere: HOROVOD_LM_CACHE=/a/larger/disk",
    ),
    (
        "Killed signal|internal compiler error|[Cc]annot allocate memory|out of memory",
        "the compiler ran out of memory: run again with --jobs 1",
    ),
    (
        "Unsupported gpu architecture|unsupported GNU version",
        "this CUDA does not support this GPU or this compiler: install another CUDA build of torch,"
        " name another compiler in CXX, or build without NCCL: --no-nccl",
    ),
    (
        r"You need C\+\+\d+",
        "the C++ compiler is too old for this torch: install a newer one and name it in CXX",
    ),
    ("", "no fix is known for this error; another compiler, named in CXX, may not have it"),
)


def kept_wheel(cache: Path, key: str) -> Path | None:
    """Return the wheel of an earlier build with this key, or None."""
    return next((cache / "wheels" / key).glob("horovod-*.whl"), None)


def build_wheel(toolchain: Toolchain, cache: Path, jobs: int) -> Path:
    """Build the wheel and put it in the cache atomically.

    Raises:
        UserError: the source cannot be fetched, does not compile, or the result does not work.
    """
    source = fetch_source(cache)
    for stale in cache.glob("building-*"):  # of a killed build: this process holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as folder:
        wheel = compile_wheel(toolchain, source, Path(folder), cache / "logs", jobs)
        finished = Path(folder) / "finished"
        finished.mkdir()
        wheel.rename(finished / wheel.name)
        place = cache / "wheels" / toolchain.key
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        finished.rename(place)
    return place / wheel.name


def fetch_source(cache: Path) -> Path:
    """Return the source distribution, from the cache or pip's index, after checking its hash.

    Raises:
        UserError: it cannot be downloaded, or is not the released file.
    """
    kept = cache / "sdist" / f"horovod-{HOROVOD_VERSION}.tar.gz"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            requirement = Path(folder) / "requirement.txt"
            requirement.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{SDIST_SHA256}\n")
            options = "--no-deps --no-binary horovod --no-build-isolation --require-hashes".split()
            options += ["--requirement", str(requirement), "--dest", folder]
            if why := run_pip("download", *options):
                raise UserError(
                    f"pip could not download horovod {HOROVOD_VERSION} ({why}); run this again with"
                    f" a network, or put its source distribution at {kept}"
                )
            (Path(folder) / kept.name).rename(kept)
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise UserError(
            f"{kept} is not horovod {HOROVOD_VERSION} as it was released (its SHA-256 is {found},"
            f" not {SDIST_SHA256}); nothing was built; remove the file and run this again"
        )
    return kept


def compile_wheel(toolchain: Toolchain, sdist: Path, folder: Path, logs: Path, jobs: int) -> Path:
    """Unpack, patch, compile and try out; return the wheel. `folder` has all files but the log.

    Raises:
        UserError: with the compiler's errors, what to do, and the log's path.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"horovod-{toolchain.key}.log"
    log.write_text("")
    minutes = 6 if toolchain.nccl else 3.5
    print(
        f"building Horovod {HOROVOD_VERSION} for torch {toolchain.torch}, {toolchain.summary}:\n"
        f"  about {minutes} minutes on two cores, here {jobs} compiler(s); log: {log}",
        flush=True,
    )
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python >= 3.11.4
        archive.extractall(folder)
    source = folder / f"horovod-{HOROVOD_VERSION}"
    apply_patches(source)
    options = "--verbose --no-deps --no-build-isolation --use-pep517 --wheel-dir".split()
    env = build_environment(toolchain, jobs)
    if toolchain.cuda:
        env |= build_variables(toolchain.cuda, folder / "links")
    command = pip_command("wheel", *options, str(folder), str(source))
    if not run_step("Horovod", command, log, env=env, grace=20):
        raise UserError(explain_failure(log))
    wheel = next(folder.glob("horovod-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    try_build(toolchain, folder / "unpacked")
    return wheel


def build_environment(toolchain: Toolchain, jobs: int) -> dict[str, str]:
    """Return the environment variables of a build with so many compilers at a time."""
    # A HOROVOD_WITH_... of the user would make a wheel that its key does not describe.
    env = environment_without_horovod() | {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_CPU_OPERATIONS": "GLOO",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_LOCAL_VERSION": f"lm.{toolchain.key}",
        "HOROVOD_CMAKE": find_cmake(),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # the bundled Gloo asks for 2.8; CMake 4 refuses
        "CMAKE_GENERATOR": "Unix Makefiles",  # it reads MAKEFLAGS
        "MAKEFLAGS": f"-j{jobs}",  # never what is inherited: `make setup` sets it for itself
    }
    if toolchain.nccl:
        env["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return env


def try_build(toolchain: Toolchain, folder: Path | None = None) -> None:
    """Check that a build works and contains what it should.

    Args:
        toolchain: what the build must contain.
        folder: the folder of a build; None: the installed Horovod.

    Raises:
        UserError: it does not.
    """
    try:
        built = try_horovod(folder=folder).built
        for feature in ["gloo"] + ["nccl"] * (toolchain.nccl is not None):
            if not built[feature]:
                raise TrialError(f"{feature} is not in this build")
        if toolchain.nccl:
            try_horovod(ranks=2, folder=folder)
    except TrialError as error:
        raise UserError(
            f"Horovod is built but does not work ({error}); build it again with the same"
            " options and --force"
        ) from None


def available_jobs() -> int:
    """Return as many compilers as there are cores, but no more than fit in memory."""
    import psutil

    limits = [psutil.virtual_memory().available, container_memory()]
    memory = min(limit for limit in limits if limit is not None)
    return max(1, min(available_cores(), int(memory // BYTES_PER_COMPILER)))


def explain_failure(log: Path) -> str:
    """Return the first error of a failed build as its tools printed it, what to do, and the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if not NOISE.search(line)]
    first = next((n for n, line in enumerate(lines) if ERROR.search(line)), -LINES_SHOWN)
    output = "\n".join(f"  | {line}" for line in lines[first:][:LINES_SHOWN])
    fix = next(fix for pattern, fix in FIXES if re.search(pattern, text))
    return f"the build failed:\n{output}\nWhat to do: {fix}\nThe full log: {log}"
