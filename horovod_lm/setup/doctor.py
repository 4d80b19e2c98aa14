"""Say what works on this machine, and how to mend what does not.

    python -m horovod_lm.setup.doctor            # one line per check
    python -m horovod_lm.setup.doctor --json     # the same, for a program
    python -m horovod_lm.setup.doctor --hosts configs/cluster.yaml   # check several hosts

Each line is `ok`, `warn` (the course works, but something is slower or missing) or `fail` (the
course does not work); under a line that is not ok stands how to mend it. The exit code is 0 when
nothing fails, and 1 otherwise. The whole takes about ten seconds: the last line starts two real
Horovod ranks and times an allreduce between them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.setup.trial import TrialError, time_allreduce, try_one_rank
from horovod_lm.utils.cli import command, run_cli
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.machine import has_gpu_driver

GIB = 2**30
EXIT_SOMETHING_FAILS = 1
WORKS = "everything that the course needs works."

# Each below what the smallest config needs with two ranks, rounded up.
LEAST_MEMORY = 2 * GIB
LEAST_DISK = 1 * GIB
LEAST_SHARED_MEMORY = 0.25 * GIB


def check_python() -> Iterator[Finding]:
    """Python, and where the package is read from."""
    from horovod_lm.setup.environment import former_folder, make_command

    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", OK, f"{version}, {sys.executable}")
    folder = Path(sys.prefix)
    if moved_from := former_folder(folder):
        says = f"moved: its programs start the Python of {moved_from}"
        yield Finding("environment", FAIL, says, make_command("setup", folder))
    try:
        version = importlib.metadata.version("horovod_lm")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    yield Finding("horovod_lm", OK, f"{version}, {Path(__file__).resolve().parents[1]}")


def check_torch() -> Iterator[Finding]:
    """torch and the GPUs that it sees."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", FAIL, f"cannot be imported: {error}", "make setup")
        return
    yield Finding("torch", OK, torch.__version__)
    if gpus_seen():
        yield Finding("GPU", OK, ", ".join(gpus_seen()))
    else:
        yield missing_gpu(torch.version.cuda)


def missing_gpu(torch_cuda: str | None) -> Finding:
    """Return why torch finds no GPU, and what to do where NVIDIA's driver is installed.

    Args:
        torch_cuda: the CUDA version that torch was built with, or None.
    """
    from horovod_lm.setup.cuda import why_no_gpu
    from horovod_lm.setup.environment import make_command

    why = why_no_gpu(torch_cuda)
    if not has_gpu_driver():
        return Finding("GPU", OK, f"{why}; everything in the course runs on the CPU")
    if torch_cuda is None:
        setup = make_command("setup", Path(sys.prefix))
        fix = f"{command('pip', 'uninstall', '--yes', 'torch')} && {setup}"
    elif why:
        fix = "see https://docs.nvidia.com/deploy/cuda-compatibility"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        why, fix = "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"
    else:
        why = "NVIDIA's driver is installed, but torch finds no GPU"
        fix = "run nvidia-smi; after an update of the driver, restart; with docker: --gpus all"
    return Finding("GPU", WARN, f"not used: {why}", fix)


def check_setup(folder: Path) -> Iterator[Finding]:
    """What keeps the set-up from making the environment; asked where there is none."""
    from horovod_lm.setup.environment import Setup, make_command

    try:
        _, missing = Setup(folder).look()
    except UserError as error:
        missing = [str(error)]
    for sentence in missing:
        yield Finding("set-up", FAIL, "cannot start", sentence)
    setup = make_command("setup", folder)
    yield Finding("environment", FAIL, f"{folder} lacks what the course needs", setup)


def check_compiler() -> Iterator[Finding]:
    """What Horovod is built with; only a new build needs it."""
    from horovod_lm.setup.preflight import missing_for_compiling
    from horovod_lm.setup.toolchain import describe_compiler

    missing = missing_for_compiling()
    if missing:
        yield Finding("compiler", WARN, "Horovod could not be built again here", "; ".join(missing))
    else:
        yield Finding("compiler", OK, f"{describe_compiler()}; compiles C++17")


def check_horovod() -> Iterator[Finding]:
    """Horovod: there, ours, working; what it can communicate with."""
    from horovod_lm.setup.install_horovod import installed_version, key_of, why_not_right
    from horovod_lm.setup.toolchain import inspect_toolchain

    build, version = command("horovod_lm.setup.install_horovod"), installed_version()
    if version is None:
        yield Finding("Horovod", FAIL, "not installed", build)
        return
    try:
        built = try_one_rank()
    except TrialError as error:
        yield Finding("Horovod", FAIL, f"{version} does not work: {error}", f"{build} --force")
        return
    if key_of(version) is None:
        yield Finding("Horovod", WARN, why_not_right(version), build)
    else:
        yield Finding("Horovod", OK, f"{version}, built here with the patches")
    says = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in built.items())
    if not built["gloo"]:
        yield Finding("transports", FAIL, f"{says}; the course needs gloo", f"{build} --force")
    elif gpus_seen() and not built["nccl"]:
        says += "; gradients on GPUs are reduced in CPU memory"
        if len(gpus_seen()) == 1:
            yield Finding("transports", OK, f"{says}, which is right for one GPU")
        else:
            why_not = inspect_toolchain().why_not
            yield Finding("transports", WARN, says, f"for speed: {why_not or build}")
    else:
        yield Finding("transports", OK, f"{says} (gloo is the one that the course needs)")


def check_cores() -> Iterator[Finding]:
    """Cores, threads, and whether two ranks would fight for them."""
    import psutil

    from horovod_lm.utils.machine import available_cores, container_cores

    physical, logical = psutil.cpu_count(logical=False) or "?", psutil.cpu_count()
    usable, quota = available_cores(), container_cores()
    says = f"{physical} physical, {logical} logical, {usable} usable by this process"
    says += f" (the container's CPU quota: {quota:g})" if quota is not None else ""
    if usable < 2:
        cure = "nothing to mend: it works, but two ranks take turns and teach nothing about speed"
        yield Finding("cores", WARN, says, cure)
    else:
        yield Finding("cores", OK, says)
    chosen = os.environ.get("OMP_NUM_THREADS")
    share = max(1, usable // 2)
    if chosen is None:
        yield Finding("threads", OK, f"OMP_NUM_THREADS is not set: two ranks get {share} each")
    elif not chosen.isdigit() or int(chosen) > share:
        says = f"OMP_NUM_THREADS={chosen}: two ranks have more threads than cores, and are slow"
        yield Finding("threads", WARN, says, f"unset OMP_NUM_THREADS, or set it to {share}")
    else:
        yield Finding("threads", OK, f"OMP_NUM_THREADS={chosen}")


def check_bfloat16() -> Iterator[Finding]:
    """Whether training in bfloat16 is faster here, as the flags say and as a clock says."""
    import torch

    from horovod_lm.utils.machine import cpu_flags, has_fast_bfloat16, matmul_seconds

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = sorted(flag for flag in cpu_flags() if "bf16" in flag)
    seconds = {kind: matmul_seconds(kind, device) for kind in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = "bfloat16" if has_fast_bfloat16(device) else "float32"
    where = (
        "the GPU" if device.type == "cuda" else f"this CPU ({' '.join(flags) or 'no bf16 flag'})"
    )
    says = f"products on {where} are {ratio:.1f} times as fast as in float32; `auto` takes {chosen}"
    if (ratio > 1.2) == (chosen == "bfloat16") or 0.8 < ratio < 1.2:
        yield Finding("bfloat16", OK, says)
    else:
        better = "bfloat16" if ratio > 1 else "float32"
        yield Finding("bfloat16", WARN, says, f"--set training.amp_dtype={better}")


def check_memory() -> Iterator[Finding]:
    """Memory, shared memory, and disk."""
    import psutil

    from horovod_lm.utils.machine import container_memory

    memory, limit = psutil.virtual_memory(), container_memory()
    free = min(memory.available, limit) if limit else memory.available
    yield enough("memory", free, memory.total, LEAST_MEMORY, "close other programs, or add memory")
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm")
        cure = "give the container more (docker run --shm-size 1g), or keep data.num_workers=0"
        yield enough("/dev/shm", shared.free, shared.total, LEAST_SHARED_MEMORY, cure)
    disk = shutil.disk_usage(".")
    yield enough("disk", disk.free, disk.total, LEAST_DISK, "make room, or work on a larger disk")


def check_host_name() -> Iterator[Finding]:
    """Where this host's name points: ranks on other hosts would call it by that."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        cure = f"add a line to /etc/hosts: 127.0.1.1 {name}"
        yield Finding("host name", WARN, f"{name} means no address", cure)
        return
    note = " (one host: fine; several: name the interface in cluster.yaml)"
    yield Finding("host name", OK, f"{name} is {address}{note if address[:4] == '127.' else ''}")


def check_tokenizers() -> Iterator[Finding]:
    """Which of the three tokenizers can be had without a network."""
    from horovod_lm.data.tokenizers import gpt2_is_on_disk

    if gpt2_is_on_disk():
        yield Finding("tokenizers", OK, "byte, bpe, gpt2")
    else:
        says = "byte, bpe; gpt2 would have to be downloaded, and only data.tokenizer=gpt2 needs it"
        yield Finding("tokenizers", OK, says)


def check_two_ranks() -> Iterator[Finding]:
    """Two real ranks, and the time of an allreduce between them."""
    try:
        milliseconds = 1e3 * time_allreduce(ranks=2, size=4_000_000)
    except TrialError as error:
        build = command("horovod_lm.setup.install_horovod", "--force")
        cure = f"mend what fails or warns above; then: {build}"
        yield Finding("two ranks", FAIL, f"did not work: {error}", cure)
        return
    says = f"they talk; an allreduce of 4 MB takes {milliseconds:.1f} ms (median of 20)"
    yield Finding("two ranks", OK, says)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_compiler,
    check_horovod,
    check_cores,
    check_bfloat16,
    check_memory,
    check_host_name,
    check_tokenizers,
    check_two_ranks,
)


def gpus_seen() -> list[str]:
    """The names of the GPUs that torch can use; empty without torch."""
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def examine(folder: Path) -> Iterator[Finding]:
    """Everything that is looked at, in order; a check that breaks is itself a finding.

    Args:
        folder: the environment to make where this Python lacks the packages of the course.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = CHECKS
    if not all(map(importlib.util.find_spec, ("torch", "psutil"))):
        checks = (check_python, partial(check_setup, folder), check_host_name)
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            name = getattr(check, "func", check).__name__
            subject = name.removeprefix("check_").replace("_", " ")
            says = f"could not be looked at: {type(error).__name__}: {error}"
            yield Finding(subject, FAIL, says, "mend what fails above, or run: make setup")


def examine_what(hosts: str | None, folder: Path) -> Iterator[Finding]:
    """This machine, or the hosts of a configuration file."""
    if hosts is None:
        return examine(folder)
    from horovod_lm.setup.doctor_hosts import examine_hosts
    from horovod_lm.utils.config import load_config

    return examine_hosts(load_config(hosts))


def enough(subject: str, free: float, total: float, least: float, cure: str) -> Finding:
    """A finding about bytes: free of total, and whether that is at least `least`."""
    says = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free >= least:
        return Finding(subject, OK, says)
    return Finding(subject, WARN, f"{says}; {least / GIB:g} GiB are needed for comfort", cure)


def show(finding: Finding) -> None:
    """Print one finding, and under it how to mend it."""
    print(f"{finding.verdict:<5} {finding.subject:<11} {finding.says}", flush=True)
    if finding.cure:
        print(f"{'':<17} -> {finding.cure}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.setup.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument("--hosts", metavar="FILE", help="look at the hosts of this configuration")
    parser.add_argument(
        "--venv", type=Path, default=sys.prefix, help="the environment to make where none is active"
    )
    arguments = parser.parse_args(argv)
    findings = []
    for finding in examine_what(arguments.hosts, arguments.venv):
        findings.append(finding)
        if not arguments.json:
            show(finding)
    fails = sum(finding.verdict == FAIL for finding in findings)
    if arguments.json:
        print(json.dumps({"works": not fails, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        works = "these hosts can train together." if arguments.hosts else WORKS
        print(f"{fails} thing(s) to mend." if fails else works)
    return EXIT_SOMETHING_FAILS if fails else 0


if __name__ == "__main__":
    run_cli(main)
