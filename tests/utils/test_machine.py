"""Cores and memory that control groups of version 1 and 2 grant, nested or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from horovod_lm.utils import machine
from horovod_lm.utils.machine import available_cores, container_cores, container_memory

V2, V1 = "0::/", "7:cpu,cpuacct:/\n4:memory:/\n0::/"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
LIMIT, USED = "memory.limit_in_bytes", "memory.usage_in_bytes"


def write(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    (root / "membership").write_text(membership + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root, root / "membership"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        (V2, {}, None),
        (V2, {"cpu.max": "max 100000"}, None),
        (V2, {"cpu.max": "150000 100000"}, 1.5),
        # Nested: the smallest of all groups around the process, never of others.
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a/b", {"cpu.max": "50000 100000", "a/b/cpu.max": "100000 50000"}, 0.5),
        ("0::/a", {"c/cpu.max": "100000 100000", "a/b/cpu.max": "100000 100000"}, None),
        # A container that sees the host's path, but only its own group.
        ("0::/system.slice/docker-1f.scope", {"cpu.max": "100000 100000"}, 1.0),
        ("0::/../job", {"cpu.max": "200000 100000"}, 2.0),
        (V1, {f"cpu/{QUOTA}": "-1", f"cpu/{PERIOD}": "100000"}, None),
        ("3:cpu:/a:b", {f"cpu/a:b/{QUOTA}": "50000", f"cpu/a:b/{PERIOD}": "25000"}, 2.0),
        ("0::/a\n3:memory:/b", {"unified/a/cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_quota(tmp_path, membership, files, cores):
    assert container_cores(*write(tmp_path, membership, files)) == cores
    assert container_cores(tmp_path, tmp_path / "missing") is None  # no control groups


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [(32, None, 32), (32, 2.0, 2), (2, 8.0, 2), (4, 1.5, 1), (4, 0.2, 1), (4, 3.99, 3)],
)
def test_the_smaller_of_affinity_and_quota_counts(monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(machine, "container_cores", lambda: quota)
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("membership", "files", "memory"),
    [
        (V2, {}, None),
        (V2, {"memory.max": "max", "memory.current": "1000"}, None),
        ("0::/a", {"a/memory.max": "5000", "a/memory.current": "1000"}, 4000),
        (V1, {f"memory/{LIMIT}": "900", f"memory/{USED}": "100"}, 800),
    ],
)
def test_memory(tmp_path, membership, files, memory):
    assert container_memory(*write(tmp_path, membership, files)) == memory


def test_a_product_takes_some_time_and_this_processors_flags_are_read():
    assert 0 < machine.matmul_seconds(torch.bfloat16, torch.device("cpu"), size=16) < 10
    assert bool(machine.cpu_flags()) == ("\nflags" in Path("/proc/cpuinfo").read_text())


def ask_for_driver(**variables: str) -> str:
    names = "has_gpu_driver, driver_cuda"
    code = f"from horovod_lm.utils.machine import {names}; print(has_gpu_driver(), driver_cuda())"
    command, environment = [sys.executable, "-c", code], os.environ | variables
    return subprocess.check_output(command, env=environment, text=True).strip()


def test_a_gpu_driver_is_its_library_or_its_program(tmp_path):
    library, program = tmp_path / "libcuda.so.1", tmp_path / "nvidia-smi"
    source = b"int cuDriverGetVersion(int *version) { *version = 12040; return 0; }"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=source, check=True)
    assert ask_for_driver(PATH="", LD_LIBRARY_PATH=str(tmp_path)) == "True (12, 4)"
    library.write_text("no library")
    assert ask_for_driver(PATH="", LD_LIBRARY_PATH=str(tmp_path)) == "False None"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert ask_for_driver(PATH=str(tmp_path), LD_LIBRARY_PATH=str(tmp_path)) == "True None"


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("Tesla T4", None),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)],
)  # fmt: skip
def test_the_peak_of_a_card_is_known_by_its_name(monkeypatch, card, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert machine.bfloat16_peak(torch.device("cuda")) == peak
    assert machine.bfloat16_peak(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("flags", "fast"),
    [({"avx2", "fma"}, False), ({"amx_bf16"}, True), ({"avx512_bf16", "avx2"}, True)],
)
def test_a_processor_has_fast_bfloat16_when_its_flags_say_so(monkeypatch, flags, fast):
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    assert machine.has_fast_bfloat16(torch.device("cpu")) is fast
    assert machine.has_fast_bfloat16(torch.device("meta")) is False
