"""Making a wheel: the source is checked, nothing half-made is kept, an error is explained."""

from __future__ import annotations

import os
import shutil
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
    explain_failure,
    fetch_source,
    kept_wheel,
)
from horovod_lm.setup.install_horovod import cache_folder
from horovod_lm.setup.toolchain import Toolchain, inspect_toolchain
from horovod_lm.utils.errors import UserError

HERE = Toolchain("0.28.1", "abc", "2.13.0+cpu", "cpython-311", "linux-x86_64", "c++ 12.2.0")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of the test's own with the source and nothing else."""
    kept = cache_folder() / "sdist"
    if not kept.is_dir():
        pytest.skip("no Horovod source in the cache: python -m horovod_lm.setup.install_horovod")
    shutil.copytree(kept, tmp_path / "cache" / "sdist")
    return tmp_path / "cache"


def test_another_file_than_the_released_one_is_refused(cache):
    sdist = fetch_source(cache)
    data = bytearray(sdist.read_bytes())
    data[len(data) // 2] ^= 1
    sdist.write_bytes(data)
    with pytest.raises(UserError, match=r"is not horovod 0\.28\.1 as it was released .*SHA-256"):
        fetch_source(cache)


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sentence = r"^pip could not download horovod 0\.28\.1 .*put its source"
    with pytest.raises(UserError, match=sentence):
        fetch_source(tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_only_the_options_steer_the_build(monkeypatch):
    monkeypatch.setenv("HOROVOD_WITH_TENSORFLOW", "1")
    monkeypatch.setenv("HOROVOD_CUDA_HOME", "/opt/cuda")
    monkeypatch.setenv("MAKEFLAGS", "-j9 --jobserver-auth=3,4")
    env = build_environment(HERE, jobs=2)
    assert "HOROVOD_WITH_TENSORFLOW" not in env and "HOROVOD_GPU_OPERATIONS" not in env
    assert "HOROVOD_CUDA_HOME" not in env  # it would make a build with CUDA
    assert env["MAKEFLAGS"] == "-j2"
    assert env["HOROVOD_LOCAL_VERSION"] == f"lm.{HERE.key}"
    env = build_environment(replace(HERE, nccl="CUDA 12.8"), jobs=1)
    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL"


def test_a_build_that_fails_leaves_a_log_and_no_wheel(cache, monkeypatch):
    toolchain = replace(inspect_toolchain(nccl=False), compiler="one that always fails")
    monkeypatch.setenv("CXX", shutil.which("false"))
    (cache / "building-of-a-killed-run").mkdir()
    with pytest.raises(UserError, match="the build failed:(?s:.*)CMake Error") as error:
        build_wheel(toolchain, cache, jobs=1)
    assert kept_wheel(cache, toolchain.key) is None
    assert not list(cache.glob("building-*"))
    log = cache / "logs" / f"horovod-{toolchain.key}.log"
    assert str(log) in str(error.value) and "CMake Error" in log.read_text()


def test_a_terminated_build_leaves_no_wheel_and_no_compiler(cache):
    """Ctrl-C and SIGTERM are one mechanism; SIGTERM is what a job's time limit sends."""
    command = [sys.executable, "-m", "horovod_lm.setup.install_horovod", "--force", "--jobs", "1"]
    env = {**os.environ, "HOROVOD_LM_CACHE": str(cache)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    root, family = psutil.Process(process.pid), []
    try:
        deadline = time.monotonic() + 180  # other work may keep the cores busy
        while not any(_compiles(member) for member in family):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no compiler started: {process.stderr.read().decode()}")
            time.sleep(0.1)
            family = root.children(recursive=True)
        process.terminate()
        assert process.wait(timeout=30) == 130
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert not list((cache / "wheels").glob("*")) and not list(cache.glob("building-*"))
    finally:
        for survivor in family:
            if survivor.is_running():
                survivor.kill()
        process.kill()
        process.wait()


def _compiles(member: psutil.Process) -> bool:
    try:
        return "cc1plus" in member.name() or "clang" in member.name()
    except psutil.NoSuchProcess:  # compilers come and go
        return False


def test_a_real_compiler_s_error_is_shown_whole(tmp_path):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    source = tmp_path / ("a_folder_with_a_long_name_" * 8) / "error.cc"
    source.parent.mkdir()
    source.write_text("struct span { const int count; };\nvoid f(span s) {\n  s.count = 1;\n}\n")
    call = f"echo '[ 10%] Building CXX object error.cc.o -Wno-error=x'; {compiler} -c '{source}'"
    with (tmp_path / "log").open("w") as log:
        subprocess.run(["sh", "-c", call], stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin"})
    said, advice = explain_failure(tmp_path / "log").split("What to do: ")
    assert f"{source}:3:" in said and "s.count = 1;" in said and "^" in said
    assert "error.cc.o" not in said
    assert f"The full log: {tmp_path / 'log'}" in advice


@pytest.mark.parametrize(
    ("lines", "fix"),
    [
        ("/usr/bin/ld: final link failed: No space left on device", "HOROVOD_LM_CACHE"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
        ("c10.h:3:2: error: #error You need C++20 to compile PyTorch", "CXX"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_50'", "--no-nccl"),
        ("foo.cu(12): error: identifier is undefined", "no fix is known"),
    ],
)
def test_an_error_is_shown_with_what_to_do(tmp_path, lines, fix):
    noise = "\n".join(f"[ {n}%] Building CXX object error{n}.cc.o" for n in range(10, 99))
    (tmp_path / "log").write_text(f"{noise}\n{lines}\n{noise}\n")
    said, advice = explain_failure(tmp_path / "log").split("What to do: ")
    assert all(line.strip() in said for line in lines.splitlines())
    assert "Building" not in said
    assert fix in advice
