"""Build Horovod for the torch that is installed here, and install it.

    python -m horovod_lm.setup.install_horovod            # does nothing if it is up to date
    python -m horovod_lm.setup.install_horovod --force    # builds again, from nothing

Horovod links against one exact torch, so it is compiled here. The build is named after everything
that it depends on. Unless it is installed or kept: fetch the source and check its hash, patch it,
compile it, try it, and keep the wheel. Then install the wheel, and try it again.

Source and wheels are kept in ~/.cache/horovod_lm (or $HOROVOD_LM_CACHE), one folder per build. The
installed version contains the key of its build, 0.28.1+lm.<key>, by which a later call recognises
it. Without a network, put the source at $HOROVOD_LM_CACHE/sdist/horovod-0.28.1.tar.gz.

NCCL is built in where a CUDA build of torch and NVIDIA's driver are, with torch's own NCCL. The
compiler is that of the system's CUDA toolkit, if it has torch's CUDA version (HOROVOD_CUDA_HOME,
CUDA_HOME, or nvcc on PATH); for CUDA 13 and later it is otherwise installed from PyPI.

Without changing the environment:

    python -m horovod_lm.setup.install_horovod --target FOLDER
    PYTHONPATH=FOLDER python -m horovod.runner.launch -np 2 python train.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from horovod_lm.setup.build import available_jobs, build_wheel, kept_wheel, try_build
from horovod_lm.setup.steps import interrupt_on_termination, lock, run_pip
from horovod_lm.setup.toolchain import Toolchain, inspect_toolchain
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.errors import UserError


def install_horovod(
    toolchain: Toolchain, force: bool = False, jobs: int | None = None, target: Path | None = None
) -> None:
    """Make sure that the build of `toolchain` is installed and works; print what was done.

    `force` builds it again. `target` is a folder for PYTHONPATH; None: this environment.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "lock").touch()
    except OSError as error:
        raise UserError(
            f"Horovod's builds are kept in {cache}, which cannot be written ({error.strerror});"
            " name another folder: HOROVOD_LM_CACHE=/a/folder"
        ) from None
    with lock(cache / "lock", "another installation of Horovod"):
        here = installed_version(target)
        if key_of(here) == toolchain.key and not force:
            try_build(toolchain, target)
            print(f"Nothing to do: Horovod {here} is installed and works, {toolchain.summary}.")
            return
        if here and not force:
            print(f"replacing Horovod {here}, which is another build", flush=True)
        wheel = None if force else kept_wheel(cache, toolchain.key)
        if wheel is not None:
            print(f"installing the wheel kept from an earlier build: {wheel}", flush=True)
        wheel = wheel or build_wheel(toolchain, cache, jobs or available_jobs())
        options = "--no-deps --no-index --force-reinstall".split()
        if target:
            options += ["--upgrade", "--target", str(target)]
            for earlier in target.glob("horovod-*.dist-info"):  # pip would leave it
                shutil.rmtree(earlier)
        if why := run_pip("install", *options, str(wheel)):
            raise UserError(f"pip could not install {wheel}: {why}")
        try_build(toolchain, target)
        version = installed_version(target)
        print(f"Horovod {version} is installed and works, {toolchain.summary}.")


def cache_folder() -> Path:
    """Return the folder for wheels, the source and logs."""
    chosen = os.environ.get("HOROVOD_LM_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache() / "horovod_lm"


def user_cache() -> Path:
    """Return the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def installed_version(target: Path | None = None) -> str | None:
    """Return the version of Horovod that is installed here or in `target`, or None."""
    importlib.invalidate_caches()
    places = sys.path if target is None else [str(target)]
    found = next(iter(importlib.metadata.distributions(name="horovod", path=places)), None)
    return found.version if found else None


def key_of(version: str | None) -> str | None:
    """Return the key in a version, or None if this project did not build it."""
    found = re.search(r"\+lm\.([0-9a-f]{12})$", version or "")
    return found.group(1) if found else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.setup.install_horovod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    nccl_help = "include NCCL, for GPUs (default: with a CUDA build of torch and NVIDIA's driver)"
    add("--nccl", action=argparse.BooleanOptionalAction, help=nccl_help)
    add("--force", action="store_true", help="build again, even if nothing has changed")
    add("--jobs", type=int, metavar="N", help="compilers at a time (default: cores and memory)")
    add("--target", type=Path, metavar="FOLDER", help="install into this folder, for PYTHONPATH")
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {arguments.jobs}")
    interrupt_on_termination()
    target = arguments.target and arguments.target.absolute()
    toolchain = inspect_toolchain(nccl=arguments.nccl)
    install_horovod(toolchain, arguments.force, arguments.jobs, target)
    return 0


if __name__ == "__main__":
    run_cli(main)
