"""What goes into the name of a build, and what is said when something for it is missing."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from horovod_lm.installation import toolchain
from horovod_lm.installation.toolchain import Toolchain, inspect_toolchain
from horovod_lm.utils.errors import UserError

HERE = Toolchain("0.28.1", "abc", "2.13.0+cpu", "cpython-311", "linux-x86_64", "c++ 12.2.0")


def test_the_key_is_twelve_digits_and_stays_the_same():
    assert HERE.key == replace(HERE).key
    assert len(HERE.key) == 12 and int(HERE.key, 16) >= 0


@pytest.mark.parametrize("field", [field.name for field in fields(Toolchain)])
def test_the_key_changes_with_everything_that_the_wheel_depends_on(field):
    assert replace(HERE, **{field: "another"}).key != HERE.key


def test_features_are_gloo_and_what_else_is_built():
    assert HERE.features == ["gloo"]
    assert replace(HERE, mpi="g++ 12", nccl="CUDA 12.8").features == ["gloo", "mpi", "nccl"]


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


def test_nccl_that_cannot_be_built_says_all_that_is_lacking(only_on_path):
    only_on_path("make", "c++")
    with pytest.raises(UserError, match="^--nccl cannot be built here: .*`nvcc` is not on PATH"):
        inspect_toolchain(nccl=True)


def test_nccl_is_found_where_the_user_says(only_on_path, tmp_path, monkeypatch):
    only_on_path("make")
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "nccl.h").write_text("")
    monkeypatch.setenv("HOROVOD_NCCL_HOME", str(tmp_path))
    assert toolchain.what_nccl_lacks("12.8") == []
    assert toolchain.what_nccl_lacks(None) == ["the torch that is installed is not a CUDA build"]


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
