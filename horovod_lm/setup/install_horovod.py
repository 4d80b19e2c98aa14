"""Build Horovod for the torch that is installed here, and install it.

    python -m horovod_lm.setup.install_horovod            # does nothing if it is up to date
    python -m horovod_lm.setup.install_horovod --check    # only checks whether it works
    python -m horovod_lm.setup.install_horovod --force    # builds again, from nothing

Horovod links against one exact torch, so it is compiled here. The build is named after everything
that it depends on. Unless it is installed or kept: fetch the source and check its hash, patch it,
compile it, try it, and keep the wheel. Then install the wheel, and try it again.

Wheels are kept in ~/.cache/horovod_lm (or $HOROVOD_LM_CACHE), one folder per build. The installed
version carries the key of its build, 0.28.1+lm.<key>: that is how a later call recognises it.

NCCL is built in where a CUDA build of torch and NVIDIA's driver are, with torch's own NCCL. The
compiler is that of the system's CUDA toolkit, if it has torch's CUDA version (HOROVOD_CUDA_HOME,
CUDA_HOME, or nvcc on PATH); for CUDA 13 and later it is otherwise installed from PyPI.

Without a network, and without installing anything:

    python -m horovod_lm.setup.install_horovod --source horovod-0.28.1.tar.gz --target FOLDER
    PYTHONPATH=FOLDER python -m horovod.runner.launch -np 2 python train.py
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from horovod_lm.setup.build import (
    available_jobs,
    build_into,
    build_wheel,
    check_target,
    fetch_source,
    kept_wheel,
    pip_command,
    try_out,
)
from horovod_lm.setup.toolchain import Toolchain, inspect_toolchain
from horovod_lm.utils.cli import command, run_cli
from horovod_lm.utils.errors import UserError, last_line

OUR_VERSION = re.compile(r"\+lm\.([0-9a-f]{12})$")


def install_horovod(toolchain: Toolchain, force: bool = False, jobs: int | None = None) -> None:
    """Make sure that the build of `toolchain` is installed and works; say what was done.

    Args:
        toolchain: what to build for, from `inspect_toolchain`.
        force: build again, even if this build is installed or kept.
        jobs: how many compilers run at once; None lets cores and memory decide.

    Raises:
        UserError: one of the steps cannot be done; running it again starts afresh.
    """
    cache = cache_folder()
    with only_one(cache):
        here = installed_version()
        if key_of(here) == toolchain.key and not force:
            try_out(toolchain)
            print(f"Nothing to do: Horovod {here} is installed and works, {toolchain.summary}.")
            return
        if here is not None and not force:
            print(f"replacing what is installed: {why_not_right(here)}.", flush=True)
        wheel = None if force else kept_wheel(cache, toolchain.key)
        if wheel is not None:
            print(f"installing the wheel kept from an earlier build: {wheel}", flush=True)
        install_wheel(wheel or build_wheel(toolchain, cache, jobs or available_jobs()))
        try_out(toolchain)
        print(f"Horovod {installed_version()} is installed and works, {toolchain.summary}.")


def check_horovod(toolchain: Toolchain) -> None:
    """Say whether the right Horovod is installed and works; change nothing.

    Raises:
        UserError: it is not, or does not.
    """
    here = installed_version()
    if key_of(here) != toolchain.key:
        raise UserError(
            f"{why_not_right(here)}; run: {command('horovod_lm.setup.install_horovod')}"
        )
    try_out(toolchain)
    print(f"Horovod {here} is installed, fits torch {toolchain.torch}, and works.")


def cache_folder() -> Path:
    """Return the folder for wheels, the source and logs."""
    chosen = os.environ.get("HOROVOD_LM_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "horovod_lm"


def writable(cache: Path) -> Path:
    """Make the folder for builds if necessary, and return it.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        raise UserError(
            f"Horovod's builds are kept in {cache}, which cannot be written ({error.strerror});"
            " name another folder: HOROVOD_LM_CACHE=/a/folder"
        ) from None


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder`: a second installer waits, and then finds the build."""
    from filelock import FileLock, Timeout  # the set-up imports this module before it is there

    lock = FileLock(writable(folder) / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print("another installation is building Horovod; waiting for it...", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def installed_version() -> str | None:
    """Return the version of Horovod that is installed here, or None."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None


def key_of(version: str | None) -> str | None:
    """Return the key in a version, or None if this project did not build it."""
    found = OUR_VERSION.search(version or "")
    return found.group(1) if found else None


def why_not_right(version: str | None) -> str:
    """Return why an installed version with another key than the wanted one is not right."""
    if version is None:
        return "Horovod is not installed"
    if key_of(version) is None:
        return f"Horovod {version} was not built by this project, so it lacks the patches"
    return f"Horovod {version} was built with other patches or options, or for another torch"


def install_wheel(wheel: Path) -> None:
    """Install the wheel over whatever Horovod is here.

    Raises:
        UserError: pip refused.
    """
    command = [*pip_command("install --no-deps --no-index --force-reinstall"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"pip could not install {wheel}: {last_line(done.stderr or done.stdout)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.setup.install_horovod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mpi", action="store_true", help="build MPI in too (needs mpicxx)")
    parser.add_argument(
        "--nccl",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="build NCCL in, for GPUs (default: with a CUDA build of torch and NVIDIA's driver)",
    )
    parser.add_argument("--force", action="store_true", help="build again, even if all is well")
    parser.add_argument("--check", action="store_true", help="only look and try; change nothing")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="compilers at once (default: as cores and memory allow); 1 if memory runs out",
    )
    parser.add_argument(
        "--target",
        type=Path,
        metavar="FOLDER",
        help="build into this folder, for PYTHONPATH, and install nothing",
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="FILE",
        help="with --target: Horovod's source distribution (default: the kept one, or pip's index)",
    )
    arguments = parser.parse_args(argv)
    if arguments.source and not arguments.target:
        raise UserError("--source needs --target; without it the source is fetched and kept")
    if arguments.source and not arguments.source.is_file():
        raise UserError(f"--source {arguments.source} is not a file")
    if arguments.target:
        check_target(arguments.target.absolute())
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {arguments.jobs}")
    toolchain = inspect_toolchain(mpi=arguments.mpi, nccl=arguments.nccl)
    if arguments.target:
        source = arguments.source or fetch_source(writable(cache_folder()))
        jobs = arguments.jobs or available_jobs()
        build_into(toolchain, arguments.target.absolute(), source, jobs)
        print(f"Horovod is in {arguments.target} and works, {toolchain.summary}.")
    elif arguments.check:
        check_horovod(toolchain)
    else:
        install_horovod(toolchain, force=arguments.force, jobs=arguments.jobs)
    return 0


if __name__ == "__main__":
    run_cli(main)
