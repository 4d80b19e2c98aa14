"""Limits that a container sets, read from control groups of version 2 and of version 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from horovod_lm.utils.machine import container_cores, container_memory, matmul_seconds


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
    ],
)
def test_cores(tmp_path, files, cores):
    assert container_cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "1000"}, None),
        ({"memory.max": "5000", "memory.current": "1000"}, 4000),
        (
            {"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"},
            800,
        ),
    ],
)
def test_memory(tmp_path, files, memory):
    assert container_memory(write(tmp_path, files)) == memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_takes_some_time(dtype):
    assert 0 < matmul_seconds(dtype, torch.device("cpu"), size=16) < 10
