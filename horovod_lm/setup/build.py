"""Make a Horovod wheel: fetch the source, patch it, compile it, try it, keep it.

While it compiles, the percentage is shown; the output goes to a log. A failed build shows the
compiler's own error and, where it is known, the fix.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TextIO

from horovod_lm.setup.cuda import build_variables
from horovod_lm.setup.patches import HOROVOD_VERSION, SDIST_SHA256, apply_patches
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
PERCENT = re.compile(r"\[\s*(\d{1,3})%\] (?:Building|Linking|Built)")
ERROR = re.compile(
    r"\berror\s*:|CMake Error|\bfatal\s*:|undefined reference|cannot find -l|Error: "
    r"|No space left on device|[Cc]annot allocate memory|Killed"
)
NOISE = re.compile(r"subprocess-exited|metadata-generation-failed|ERROR: Failed|CalledProcessError")
SOURCE_LINE = re.compile(r"\s*\d* +\| ")  # GCC's copy of the source, with a caret below
BLOCKS_SHOWN, LINES_OF_A_BLOCK = 3, 8

# (what the log says, what to do about it); the first that is found is shown.
CURES = (
    (
        r"No space left on device",
        "free some disk space, or put the cache elsewhere: HOROVOD_LM_CACHE=/a/larger/disk",
    ),
    (
        r"Killed signal|internal compiler error|[Cc]annot allocate memory|out of memory",
        "the compiler ran out of memory: run again with --jobs 1",
    ),
    (r"Python\.h: No such file", "Python's headers are missing: apt-get install python3-dev"),
    (r"Could NOT find NCCL", "NCCL's library was not found: set HOROVOD_NCCL_HOME, or --no-nccl"),
    (r"Could NOT find MPI", "MPI does not compile: install libopenmpi-dev, or leave out --mpi"),
    (
        r"Unsupported gpu architecture|unsupported GNU version",
        "this CUDA does not support this GPU or this compiler: install another CUDA build of torch,"
        " name another compiler in CXX, or build without NCCL: --no-nccl",
    ),
    (
        r"You need C\+\+\d+|unrecognized command.line option .-std=",
        "the C++ compiler is too old for this torch: install a newer one and name it in CXX",
    ),
    (r"CMake \d\S* or higher is required", "CMake is too old: python -m pip install -U cmake"),
)
OTHERWISE = "no fix is known for this error; another compiler, named in CXX, may not have it"


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


def run_with_progress(
    command: list[str], env: dict[str, str], log: Path, title: str, stream: TextIO | None = None
) -> None:
    """Run a build to its end, show its percentage, and write all its output to `log`.

    Args:
        command: the build; an interrupt ends it and every process that it started.
        env: its environment variables.
        log: the file for its output.
        title: what is built.
        stream: where the percentage is shown: one changing line on a terminal, elsewhere a line
            for each tenth; None is stdout.

    Raises:
        UserError: it failed; with its errors, what to do, and the path of the log.
    """
    stream = stream or sys.stdout
    started, shown = time.monotonic(), -1
    start, end = ("\r\x1b[K", "") if stream.isatty() else ("", "\n")

    def show(state: str, end: str = "\n") -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        stream.write(f"{start}  {title}: {state} after {minutes}m{seconds:02d}s{end}")
        stream.flush()

    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                found = PERCENT.search(line)
                # Parallel compilers finish out of order: the percentage only rises.
                if found and int(found[1]) // (1 if start else 10) > shown:
                    shown = int(found[1]) // (1 if start else 10)
                    show(f"{found[1]} % compiled", end)
            code = process.wait()
        except BaseException:
            _stop_group(process)
            show("stopped")
            raise
    show("built" if code == 0 else "failed")
    if code != 0:
        raise UserError(explain_failure(log))


def explain_failure(log: Path) -> str:
    """Return the errors of a failed build as its tools printed them, what to do, and the log."""
    lines = log.read_text(encoding="utf-8").splitlines()
    blocks: list[list[str]] = []
    for number, line in enumerate(lines):
        if ERROR.search(line) and not NOISE.search(line):
            block = [line]
            for after in lines[number + 1 : number + LINES_OF_A_BLOCK]:
                deeper = _indent(after) > _indent(line) or not after.strip()
                if ERROR.search(after) or not (deeper or SOURCE_LINE.match(after)):
                    break
                block.append(after)
            blocks.append(block)
    chosen = sum(blocks[:BLOCKS_SHOWN], []) or lines[-15:]
    said = "\n".join(f"  | {line}" for line in chosen if line.strip())
    text = "\n".join(lines)
    cure = next((cure for pattern, cure in CURES if re.search(pattern, text)), OTHERWISE)
    return f"the build failed:\n{said}\nWhat to do: {cure}\nThe full log: {log}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _stop_group(process: subprocess.Popen[str]) -> None:
    """End the build and every compiler that it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except ProcessLookupError:
        pass
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
