"""What this machine has: limits that a container sets, and how fast it multiplies."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def container_cores(root: Path = CGROUP) -> float | None:
    """How many cores' time the control group grants, or None where it sets no limit.

    Args:
        root: where control groups are mounted, version 2 or 1
            (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    quota, period = (_words(root / "cpu.max") + ["", ""])[:2]
    if not quota:
        quota = "".join(_words(root / "cpu" / "cpu.cfs_quota_us"))
        period = "".join(_words(root / "cpu" / "cpu.cfs_period_us"))
    if not (quota.isdigit() and period.isdigit()):  # "max" and "-1" mean no limit
        return None
    return int(quota) / int(period)


def container_memory(root: Path = CGROUP) -> int | None:
    """How many bytes the control group still grants, or None where it sets no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = _words(root / limit) + _words(root / used)
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            return int(numbers[0]) - int(numbers[1])
    return None


def matmul_seconds(dtype: torch.dtype, device: torch.device, size: int = 768) -> float:
    """The time of a (size, size) by (size, size) matrix product, in seconds; median of 7."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one also sets the kernels up


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
