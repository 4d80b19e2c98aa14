"""Check what works on this machine, and say how to fix what does not.

    python -m horovod_lm.setup.doctor            # one line per check
    python -m horovod_lm.setup.doctor --json     # the same, for a program
    python -m horovod_lm.setup.doctor --hosts configs/cluster.yaml   # check several hosts

Each line is `ok`, `warn` (the course works, but something is slower or missing) or `fail` (the
course does not work); below a line that is not ok is its fix. The exit code is 0 when nothing
fails, and 1 otherwise. The check takes about ten seconds: its last line starts two real Horovod
ranks and times an allreduce between them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from horovod_lm.setup.cuda import why_no_gpu
from horovod_lm.setup.environment import Setup, former_folder, make_command
from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.setup.install_horovod import installed_version, key_of
from horovod_lm.setup.toolchain import inspect_toolchain
from horovod_lm.setup.trial import TrialError, try_horovod
from horovod_lm.utils import machine
from horovod_lm.utils.cli import command, run_cli
from horovod_lm.utils.errors import UserError

GIB = 2**30
INSTALL = "horovod_lm.setup.install_horovod"
# More than the smallest config needs with two ranks.
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED_MEMORY = 2 * GIB, 1 * GIB, 0.25 * GIB


def check_python() -> Iterator[Finding]:
    """Python, and the folder of the package."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", OK, f"{version}, {sys.executable}")
    if moved_from := former_folder(Path(sys.prefix)):
        message = f"moved: its programs start the Python of {moved_from}"
        yield Finding("environment", FAIL, message, make_command("setup", Path(sys.prefix)))
    version = machine.package_version("horovod_lm") or "not installed"
    yield Finding("horovod_lm", OK, f"{version}, {Path(__file__).resolve().parents[1]}")


def check_torch() -> Iterator[Finding]:
    """torch and the GPUs that it sees."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", FAIL, f"cannot be imported: {error}", install_torch_again())
        return
    yield Finding("torch", OK, torch.__version__)
    gpus = range(torch.cuda.device_count())
    if gpus:
        yield Finding("GPU", OK, ", ".join(map(torch.cuda.get_device_name, gpus)))
    else:
        yield missing_gpu(torch.version.cuda)


def install_torch_again() -> str:
    """Return the command for another torch: set-up chooses the build only where there is none."""
    setup = make_command("setup", Path(sys.prefix))
    return f"{command('pip', 'uninstall', '--yes', 'torch')} && {setup}"


def missing_gpu(torch_cuda: str | None) -> Finding:
    """Return why torch, built with this version of CUDA or None, finds no GPU, and what to do."""
    why = why_no_gpu(torch_cuda)
    if not machine.has_gpu_driver():
        return Finding("GPU", OK, f"{why}; everything in the course runs on the CPU")
    if torch_cuda is None:
        fix = install_torch_again()
    elif why:
        fix = "see https://docs.nvidia.com/deploy/cuda-compatibility"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        why, fix = "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"
    else:
        why = "NVIDIA's driver is installed, but torch finds no GPU"
        fix = "run nvidia-smi; after an update of the driver, restart; with docker: --gpus all"
    return Finding("GPU", WARN, f"not used: {why}", fix)


def check_setup(folder: Path) -> Iterator[Finding]:
    """What prevents set-up from creating the environment; checked where there is none."""
    try:
        missing = Setup(folder).missing()
    except UserError as error:
        missing = [str(error)]
    for sentence in missing:
        yield Finding("set-up", FAIL, "cannot start", sentence)
    message = f"{folder} lacks packages of the course"
    yield Finding("environment", FAIL, message, make_command("setup", folder))


def check_horovod() -> Iterator[Finding]:
    """Horovod: installed, built by this project, working; its communication libraries."""
    version = installed_version()
    if version is None:
        yield Finding("Horovod", FAIL, "not installed", command(INSTALL))
        return
    try:
        built = try_horovod().built
    except TrialError as error:
        message = f"{version} does not work: {error}"
        yield Finding("Horovod", FAIL, message, command(INSTALL, "--force"))
        return
    if key_of(version) is None:
        message = f"Horovod {version} was not built by this project, so it lacks the patches"
        yield Finding("Horovod", WARN, message, command(INSTALL))
    else:
        yield Finding("Horovod", OK, f"{version}, built here with the patches")
    message = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in built.items())
    from torch.cuda import device_count  # it can be imported, or the trial would have failed

    gpus = device_count()
    if built["nccl"] or not gpus:
        yield Finding("transports", OK, f"{message} (the course needs gloo)")
        return
    message += "; gradients on GPUs are reduced in CPU memory"
    if gpus == 1:
        yield Finding("transports", OK, f"{message}, which is right for one GPU")
    else:
        fix = inspect_toolchain().why_not or command(INSTALL)
        yield Finding("transports", WARN, message, f"for speed: {fix}")


def check_cores() -> Iterator[Finding]:
    """Cores and threads of two ranks."""
    import psutil

    physical, logical = psutil.cpu_count(logical=False) or "?", psutil.cpu_count()
    usable, quota = machine.available_cores(), machine.container_cores()
    message = f"{physical} physical, {logical} logical, {usable} usable by this process"
    message += f" (the container's CPU quota: {quota:g})" if quota is not None else ""
    fix = "none needed: the course works, but two ranks are no faster than one"
    yield Finding("cores", WARN, message, fix) if usable < 2 else Finding("cores", OK, message)
    chosen, share = os.environ.get("OMP_NUM_THREADS"), max(1, usable // 2)
    if chosen is None:
        yield Finding("threads", OK, f"OMP_NUM_THREADS is not set: two ranks get {share} each")
    elif not chosen.isdigit() or int(chosen) > share:
        message = f"OMP_NUM_THREADS={chosen}: two ranks have more threads than cores, and are slow"
        yield Finding("threads", WARN, message, f"unset OMP_NUM_THREADS, or set it to {share}")
    else:
        yield Finding("threads", OK, f"OMP_NUM_THREADS={chosen}")


def check_memory() -> Iterator[Finding]:
    """Memory, shared memory, and disk."""
    import psutil

    memory, limit = psutil.virtual_memory(), machine.container_memory()
    free = min(memory.available, limit) if limit else memory.available
    yield enough("memory", free, memory.total, LEAST_MEMORY, "close other programs, or add memory")
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm")
        fix = "give the container more (docker run --shm-size 1g), or set data.num_workers=0"
        yield enough("/dev/shm", shared.free, shared.total, LEAST_SHARED_MEMORY, fix)
    disk = shutil.disk_usage(".")
    yield enough("disk", disk.free, disk.total, LEAST_DISK, "free space, or work on a larger disk")


def enough(subject: str, free: float, total: float, least: float, fix: str) -> Finding:
    """Return a finding about bytes: whether at least `least` of `total` are free."""
    message = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free >= least:
        return Finding(subject, OK, message)
    return Finding(subject, WARN, f"{message}; {least / GIB:g} GiB are recommended", fix)


def check_two_ranks() -> Iterator[Finding]:
    """Two real ranks, and the time of an allreduce between them."""
    try:
        milliseconds = try_horovod(ranks=2).milliseconds
    except TrialError as error:
        fix = f"fix what fails or warns above; then: {command(INSTALL, '--force')}"
        yield Finding("two ranks", FAIL, f"do not work: {error}", fix)
        return
    message = f"they work; an allreduce of 4 MB takes {milliseconds:.1f} ms (median of 20)"
    yield Finding("two ranks", OK, message)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": check_python,
    "torch": check_torch,
    "Horovod": check_horovod,
    "cores": check_cores,
    "memory": check_memory,
    "two ranks": check_two_ranks,
}


def examine(folder: Path) -> Iterator[Finding]:
    """Yield the findings of all checks in order; an exception in a check is itself a finding.

    `folder` is the environment to create where this Python lacks the packages of the course.
    """
    checks = CHECKS
    if not all(map(importlib.util.find_spec, ("torch", "psutil"))):
        checks = {"Python": check_python, "set-up": partial(check_setup, folder)}
    for subject, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            message = f"could not be checked: {type(error).__name__}: {error}"
            fix = f"fix what fails above, or run: {make_command('setup', Path(sys.prefix))}"
            yield Finding(subject, FAIL, message, fix)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.setup.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON document instead")
    add("--hosts", metavar="FILE", help="check the hosts of this configuration")
    venv_help = "the environment to create if none is active"
    add("--venv", type=Path, default=sys.prefix, help=venv_help)
    arguments = parser.parse_args(argv)
    found = examine(arguments.venv)
    if arguments.hosts is not None:
        from horovod_lm.setup.doctor_hosts import examine_hosts
        from horovod_lm.utils.config import load_config

        found = examine_hosts(load_config(arguments.hosts))
    fails = 0
    shown = []
    for finding in found:
        fails += finding.verdict == FAIL
        shown.append(finding._asdict())
        if not arguments.json:
            print(f"{finding.verdict:<5} {finding.subject:<11} {finding.message}")
            print(f"{'':<17} -> {finding.fix}\n" if finding.fix else "", end="", flush=True)
    if arguments.json:
        print(json.dumps({"works": not fails, "findings": shown}, indent=2))
    elif fails:
        print(f"{fails} problem(s) to fix.")
    else:
        print("these hosts can train together." if arguments.hosts else "the course works here.")
    return 1 if fails else 0


if __name__ == "__main__":
    run_cli(main)
