"""The key of a build, and what is said when something for it is missing."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from horovod_lm.setup import cuda
from horovod_lm.setup.toolchain import Toolchain, inspect_toolchain, missing_for_build
from horovod_lm.utils.errors import UserError

HERE = Toolchain("0.28.1", "abc", "2.13.0+cpu", "cpython-311", "linux-x86_64", "c++ 12.2.0")


@pytest.mark.parametrize("field", [field.name for field in fields(Toolchain)])
def test_the_key_changes_with_everything_that_the_wheel_depends_on_and_nothing_else(field):
    assert re.fullmatch("[0-9a-f]{12}", HERE.key) and HERE.key == replace(HERE).key
    same = replace(HERE, **{field: "another"}).key == HERE.key
    assert same == (field in ("cuda", "why_not"))


def test_this_machine_can_be_inspected_also_without_room_for_temporary_files(monkeypatch):
    import torch

    monkeypatch.setenv("TMPDIR", "/dev/full")
    found = inspect_toolchain(nccl=False)
    assert found.torch == torch.__version__
    assert found.nccl is None and any(character.isdigit() for character in found.compiler)


def test_a_compiler_without_cpp17_and_missing_headers_are_a_sentence_each(tmp_path, monkeypatch):
    compiler = tmp_path / "old-c++"
    compiler.write_text('#!/bin/sh\necho "error: unrecognized option -std=c++17" >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("CPATH", raising=False)
    headers, cpp17 = missing_for_build(tmp_path)
    assert headers.startswith(f"Python's headers are missing ({tmp_path}/Python.h); on Debian")
    assert re.fullmatch(r"the C\+\+ compiler `.*old-c\+\+` does not compile C\+\+17,.*", cpp17)
    (tmp_path / "elsewhere").mkdir()
    Path(tmp_path, "elsewhere", "Python.h").touch()
    monkeypatch.setenv("CPATH", str(tmp_path / "elsewhere"))
    assert missing_for_build(tmp_path) == [cpp17]
    # CMake reads CXX too, and fails.
    monkeypatch.setenv("CXX", "no-ccache g++")
    with pytest.raises(UserError, match="^CXX names no-ccache, which was not found;"):
        inspect_toolchain()


def test_a_build_without_nccl_says_why_and_is_refused_where_nccl_is_asked_for(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr(cuda, "find_toolkit", lambda *_, **__: None)
    monkeypatch.setattr(cuda, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(cuda, "driver_cuda", lambda: (12, 4))
    reason = r"NCCL needs the compiler of CUDA 12\.8, .*: install NVIDIA's CUDA toolkit 12\.8"
    found = inspect_toolchain()
    assert found.nccl is None and re.match(reason, found.why_not)
    with pytest.raises(UserError, match=reason):
        inspect_toolchain(nccl=True)
    assert inspect_toolchain(nccl=False).why_not == "--no-nccl was given"
