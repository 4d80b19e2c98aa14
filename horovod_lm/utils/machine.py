"""What this machine has: cores, memory, GPU driver, bfloat16 instructions, packages.

Importing this module does not import torch: the installer uses it too.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Without these instructions, bfloat16 is slower than float32.
_BFLOAT16_CPU_FLAGS = {"amx_bf16", "avx512_bf16"}
# Dense, with float32 sums, from NVIDIA's data sheets, by a part of the name that the driver gives.
_BFLOAT16_PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the number of cores for this process: the minimum of affinity and CPU quota.

    A quota of 1.5 cores counts as 1: two threads would use it up in 75 of every 100 ms, and the
    kernel would suspend both for the other 25 ms, while the other ranks wait.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = container_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def container_cores(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> float | None:
    """Return the CPU quota of this process's control groups in cores; None: no limit.

    `root` is the mount point of the control groups, version 2
    (https://docs.kernel.org/admin-guide/cgroup-v2.html) or 1. In the file `membership`, the kernel
    lists the groups of this process.
    """
    quotas = []
    for folder in _control_groups("cpu", root, membership):
        words = _words(folder / "cpu.max") or (
            _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        )
        if len(words) == 2 and all(word.isdigit() for word in words):  # "max", "-1": no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def container_memory(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> int | None:
    """Return the bytes left in this process's control groups; None: no limit."""
    free = []
    for folder in _control_groups("memory", root, membership):
        words = _words(folder / "memory.max") + _words(folder / "memory.current") or (
            _words(folder / "memory.limit_in_bytes") + _words(folder / "memory.usage_in_bytes")
        )
        if len(words) == 2 and all(word.isdigit() for word in words):
            free.append(int(words[0]) - int(words[1]))
    return min(free, default=None)


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface that has an IP address."""
    import psutil  # absent while the installer runs

    for name, entries in psutil.net_if_addrs().items():
        if address in {entry.address for entry in entries}:
            return name
    raise ValueError(f"no interface of this machine has the address {address}")


def has_gpu_driver() -> bool:
    """Return whether NVIDIA's driver is installed: its library loads, or `nvidia-smi` is on PATH.

    A driver without a GPU counts as well, for example on the login node of a cluster.
    """
    return driver_cuda() is not None or shutil.which("nvidia-smi") is not None


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver supports, such as (13, 0); None: no driver.

    A program built for a newer major version of CUDA finds no GPU.
    """
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):  # no such library, or none of NVIDIA's
        return None
    return version.value // 1000, version.value % 1000 // 10


def matmul_seconds(dtype: torch.dtype, device: torch.device, size: int = 768) -> float:
    """Return the median time of 7 (size, size) by (size, size) matrix products, in seconds."""
    import torch

    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one also sets the kernels up


def _control_groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's group and its parents: each can set a limit.

    In a container, `membership` may hold the host's path, which is not mounted there; the mount
    point itself is then the container's own group.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controller]
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for mount in mounts:
            yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, so that a renamed file survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(_BFLOAT16_CPU_FLAGS & cpu_flags())


def bfloat16_peak(device: torch.device) -> float | None:
    """Return the bfloat16 operations per second that the device can do; None: not known."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a card
        return None
    found = (peak for card, peak in _BFLOAT16_PEAKS.items() if re.search(rf"\b{card}\b", name))
    return next(found, None)


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_flags() -> set[str]:
    """Return the processor's feature flags; empty if the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
