"""Making a wheel: the source is checked, nothing half-made is kept, and a failure can be rerun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from horovod_lm.setup.build import (
    build_environment,
    build_wheel,
    check_source,
    fetch_source,
    kept_wheel,
)
from horovod_lm.setup.install_horovod import cache_folder
from horovod_lm.setup.toolchain import Toolchain, inspect_toolchain
from horovod_lm.utils.errors import UserError

HERE = Toolchain("0.28.1", "abc", "2.13.0+cpu", "cpython-311", "linux-x86_64", "c++ 12.2.0")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of the test's own that holds the source and nothing else."""
    kept = cache_folder() / "sdist"
    if not kept.is_dir():
        pytest.skip("no Horovod source in the cache: python -m horovod_lm.setup.install_horovod")
    shutil.copytree(kept, tmp_path / "cache" / "sdist")
    return tmp_path / "cache"


def test_another_file_than_the_released_one_is_refused(cache):
    sdist = next((cache / "sdist").glob("*.tar.gz"))
    check_source(sdist)
    data = bytearray(sdist.read_bytes())
    data[len(data) // 2] ^= 1
    sdist.write_bytes(data)
    with pytest.raises(UserError, match=r"is not horovod 0\.28\.1 as it was released .*SHA-256"):
        fetch_source(cache)


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^pip could not download horovod 0\.28\.1 .*put its source"
    ):
        fetch_source(tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_only_the_options_steer_the_build(monkeypatch):
    monkeypatch.setenv("HOROVOD_WITH_TENSORFLOW", "1")
    monkeypatch.setenv("HOROVOD_WITH_MPI", "1")
    monkeypatch.setenv("HOROVOD_CUDA_HOME", "/opt/cuda")
    monkeypatch.setenv("MAKEFLAGS", "-j9 --jobserver-auth=3,4")
    env = build_environment(HERE, jobs=2)
    assert "HOROVOD_WITH_TENSORFLOW" not in env and "HOROVOD_WITH_MPI" not in env
    assert env["HOROVOD_WITHOUT_MPI"] == "1" and "HOROVOD_GPU_OPERATIONS" not in env
    assert "HOROVOD_CUDA_HOME" not in env  # it would make a build with CUDA
    assert env["MAKEFLAGS"] == "-j2"
    assert env["HOROVOD_LOCAL_VERSION"] == f"lm.{HERE.key}"


def test_mpi_and_nccl_are_built_when_the_toolchain_has_them():
    env = build_environment(replace(HERE, mpi="g++ 12", nccl="CUDA 12.8"), jobs=1)
    assert env["HOROVOD_WITH_MPI"] == "1" and "HOROVOD_WITHOUT_MPI" not in env
    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL"


def test_a_build_that_fails_leaves_a_log_and_no_wheel(cache, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    toolchain = replace(inspect_toolchain(nccl=False), compiler="one that always fails")
    (cache / "building-of-a-killed-run").mkdir()
    with pytest.raises(UserError, match="the build failed:(?s:.*)CMake Error") as error:
        build_wheel(toolchain, cache, jobs=1)
    assert kept_wheel(cache, toolchain.key) is None
    assert not list(cache.glob("building-*"))
    log = cache / "logs" / f"horovod-{toolchain.key}.log"
    assert str(log) in str(error.value) and "CMake Error" in log.read_text()


@pytest.fixture
def build(cache):
    """A build that has come to its compiler: the process, and every process that it started."""
    command = [sys.executable, "-m", "horovod_lm.setup.install_horovod", "--force", "--jobs", "1"]
    env = {**os.environ, "HOROVOD_LM_CACHE": str(cache)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    root = psutil.Process(process.pid)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 180  # other work may keep the cores busy
        while not any(_compiles(member) for member in family):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no compiler started: {process.stderr.read().decode()}")
            time.sleep(0.1)
            family = _family(root)
        yield process, family
    finally:  # a compiler that is left is counted as another test's
        for survivor in [*family, *_family(root)]:
            _kill(survivor)
        process.kill()
        process.wait()


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_no_wheel_and_no_compiler(cache, build, blow):
    process, family = build
    process.send_signal(blow)
    process.wait(timeout=30)
    assert not list((cache / "wheels").glob("*"))
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert not list(cache.glob("building-*"))
        assert not psutil.wait_procs(family, timeout=10)[1]


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _compiles(member: psutil.Process) -> bool:
    try:
        return "cc1plus" in member.name() or "clang" in member.name()
    except psutil.NoSuchProcess:  # compilers come and go while we look
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass
