"""What goes into the name of a build, and what is said when something for it is missing."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from horovod_lm.setup import cuda, toolchain
from horovod_lm.setup.toolchain import Toolchain, inspect_toolchain
from horovod_lm.utils.errors import UserError

HERE = Toolchain("0.28.1", "abc", "2.13.0+cpu", "cpython-311", "linux-x86_64", "c++ 12.2.0")


def test_the_key_is_twelve_digits_and_stays_the_same():
    assert HERE.key == replace(HERE).key
    assert len(HERE.key) == 12 and int(HERE.key, 16) >= 0


@pytest.mark.parametrize("field", [field.name for field in fields(Toolchain)])
def test_the_key_changes_with_everything_that_the_wheel_depends_on_and_nothing_else(field):
    same = replace(HERE, **{field: "another"}).key == HERE.key
    assert same == (field in ("cuda", "why_not"))


def test_the_summary_says_what_is_built_in_and_why_nccl_is_not():
    cuda = "CUDA 12.8, NCCL 2.26.2, GPU architectures 80"
    assert replace(HERE, mpi="g++ 12", nccl=cuda).summary == f"with Gloo and MPI and {cuda}"
    reason = "no NVIDIA driver was found"
    assert replace(HERE, nccl=cuda, why_not=reason).summary == (
        f"with Gloo and {cuda}; no GPU for it: {reason}"
    )
    assert replace(HERE, why_not=reason).summary == (
        "with Gloo; without NCCL: no NVIDIA driver was found"
    )


def test_this_machine_can_be_inspected():
    import torch

    found = inspect_toolchain(nccl=False)
    assert found.torch == torch.__version__
    assert found.mpi is None and found.nccl is None
    assert any(character.isdigit() for character in found.compiler)


@pytest.fixture
def only_on_path(tmp_path, monkeypatch):
    """Make PATH hold the named programs and nothing else."""
    import shutil

    def choose(*programs: str) -> None:
        for program in programs:
            (tmp_path / program).symlink_to(shutil.which(program))
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(toolchain.sys, "executable", str(tmp_path / "python"))

    return choose


def test_no_compiler_is_one_sentence(only_on_path):
    only_on_path("make")
    with pytest.raises(
        UserError, match=r"^no C\+\+ compiler was found; on Debian .*build-essential"
    ):
        inspect_toolchain()


def test_no_cmake_is_one_sentence(only_on_path):
    only_on_path("make", "c++")
    with pytest.raises(UserError, match="^no CMake was found; install it: .*pip install cmake"):
        inspect_toolchain()


def test_no_make_is_one_sentence(only_on_path):
    only_on_path("c++")
    with pytest.raises(UserError, match="^no `make` was found"):
        inspect_toolchain()


def test_mpi_without_its_compiler_is_one_sentence(only_on_path):
    only_on_path("make", "c++")
    with pytest.raises(
        UserError, match="^--mpi needs MPI's `mpicxx` and `mpirun` on PATH.*libopenmpi-dev"
    ):
        inspect_toolchain(mpi=True)


def test_a_build_without_nccl_says_why_and_is_refused_where_nccl_is_asked_for(monkeypatch):
    monkeypatch.setattr(toolchain, "_installed_torch", lambda: ("2.9.0+cu128", "12.8"))
    monkeypatch.setattr(cuda, "find_toolkit", lambda *_, **__: None)
    monkeypatch.setattr(cuda, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(cuda, "driver_cuda", lambda: (12, 4))
    reason = r"NCCL needs the compiler of CUDA 12\.8, .*: install NVIDIA's CUDA toolkit 12\.8"
    found = inspect_toolchain()
    assert found.nccl is None and re.match(reason, found.why_not)
    with pytest.raises(UserError, match=reason):
        inspect_toolchain(nccl=True)
    assert inspect_toolchain(nccl=False).why_not == "--no-nccl was given"


def test_missing_modules_are_named(monkeypatch):
    monkeypatch.setattr(toolchain, "NEEDED_MODULES", ["yaml", "no_such_module_at_all"])
    with pytest.raises(UserError, match="^the build needs no_such_module_at_all, not installed"):
        inspect_toolchain()


def test_missing_headers_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        UserError, match=r"^Python's own headers \(Python\.h\) are missing.*python3-dev"
    ):
        inspect_toolchain()
