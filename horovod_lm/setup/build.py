"""Build a Horovod wheel: fetch the source, patch it, compile it, try it, keep it.

The percentage is shown during compilation; the output goes to a log. A failed build shows the
compiler's own error and, where it is known, the fix.
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
from horovod_lm.utils.cli import command
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.machine import available_cores, container_memory

BYTES_PER_COMPILER = 1.5e9  # memory of one compiler that reads torch's headers
ERROR = re.compile(
    r"\berror\s*:|CMake Error|\bfatal\s*:|undefined reference|cannot find -l|Error: "
    r"|No space left on device|[Cc]annot allocate memory|Killed"
)
NOISE = re.compile(r"subprocess-exited|metadata-generation-failed|ERROR: Failed|CalledProcessError")
SOURCE_LINE = re.compile(r"\s*\d* +\| ")  # GCC's copy of the source, with a caret below
BLOCKS_SHOWN, LINES_OF_A_BLOCK = 3, 8

# (a pattern of the log, what to do about it); the first that is found is shown.
FIXES = (
    (
        r"No space left on device",
        "free some disk space, or put the cache elsewhere: HOROVOD_LM_CACHE=/a/larger/disk",
    ),
    (
        r"Killed signal|internal compiler error|[Cc]annot allocate memory|out of memory",
        "the compiler ran out of memory: run again with --jobs 1",
    ),
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
    (
        r"CMake \d\S* or higher is required",
        "CMake is too old: " + command("pip", "install", "-U", "cmake"),
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


def build_into(toolchain: Toolchain, target: Path, source: Path, jobs: int) -> None:
    """Build Horovod and unpack it into a folder for PYTHONPATH; install nothing.

    Args:
        toolchain: what to build.
        target: a new or empty folder, or one with an earlier build, which is replaced.
        source: Horovod's source distribution.
        jobs: the number of compilers at a time.

    Raises:
        UserError: wrong source, a failed compilation, or a result that does not work.
    """
    check_source(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as folder:
        compile_wheel(toolchain, source, Path(folder), target.parent, jobs)
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / "unpacked").rename(target)


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
    check_source(kept)
    return kept


def check_source(sdist: Path) -> None:
    """Check that a source distribution is the released file.

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
    """Unpack, patch, compile and try out; all files except the log are in `folder`.

    Returns:
        The wheel; its content is in `folder`/unpacked.

    Raises:
        UserError: with the compiler's errors, what to do, and the log's path.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"horovod-{toolchain.key}.log"
    log.write_text("")
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
    """Return the environment variables that Horovod's setup.py reads.

    Args:
        toolchain: what the build is to contain.
        jobs: the number of compilers at a time.
    """
    # A HOROVOD_WITH_... of the user would make a wheel that its key does not describe.
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


def try_build(toolchain: Toolchain, folder: Path | None = None) -> None:
    """Check that a build works and contains what it should.

    Args:
        toolchain: what the build must contain.
        folder: an unpacked wheel to try instead of the installed Horovod.

    Raises:
        UserError: it does not.
    """
    try:
        built = try_horovod(folder=folder).built
        lacking = [feature for feature in toolchain.features if not built[feature]]
        if lacking:
            raise TrialError(f"{' and '.join(lacking)} is not in this build")
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
    """Return the errors of a failed build as its tools printed them, what to do, and the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
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
    output = "\n".join(f"  | {line}" for line in chosen if line.strip())
    fix = next(fix for pattern, fix in FIXES if re.search(pattern, text))
    return f"the build failed:\n{output}\nWhat to do: {fix}\nThe full log: {log}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
