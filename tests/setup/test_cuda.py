"""CUDA's compiler and NCCL: what is found on a machine, and what is said when it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horovod_lm.setup import cuda
from horovod_lm.utils.errors import UserError


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def toolkit(home: Path, release: str) -> Path:
    """A folder like a CUDA toolkit: an nvcc that says its folder and version, and a header."""
    says = f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
    program(home / "bin/nvcc", f"{says}; echo '#$ TOP={home}/bin/..' >&2")
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    return home


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a GPU or CUDA; its PATH begins with tmp_path/bin, where `sh` is."""
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "HOROVOD_NCCL_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cuda, "SYSTEM_CUDA", str(tmp_path / "usr/local/cuda"))
    return tmp_path


def test_the_system_s_toolkit_is_found_by_its_own_words(machine, monkeypatch):
    old, new = toolkit(machine / "cuda 12.6", "12.6"), toolkit(machine / "cuda 13.0", "13.0")
    assert cuda.find_toolkit("13.0", same_minor=True) is None
    program(machine / "bin/nvcc", f"exec '{new}/bin/nvcc' \"$@\"")  # a script in front of it
    assert cuda.find_toolkit("13.0", same_minor=True) == (new, "13.0")
    assert cuda.find_toolkit("13.1", same_minor=True) is None
    monkeypatch.setenv("CUDA_HOME", str(old))
    assert cuda.find_toolkit("12.8", same_minor=False) == (old, "12.6")
    assert cuda.find_toolkit("13.0", same_minor=True) == (new, "13.0")
    (new / "include/cuda_runtime.h").unlink()  # a compiler without its headers
    assert cuda.find_toolkit("13.0", same_minor=True) is None


def test_what_is_missing_for_nccl_is_one_sentence(machine, monkeypatch):
    with pytest.raises(UserError, match="^NCCL needs a CUDA build of torch"):
        cuda.find_cuda(None)
    with pytest.raises(UserError, match=r"^NCCL needs the compiler of CUDA 12\.8.*CUDA_HOME$"):
        cuda.find_cuda("12.8")
    monkeypatch.setattr(cuda, "_nvidia", list)
    monkeypatch.setattr(cuda, "SYSTEM_FOLDERS", ())
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    with pytest.raises(UserError, match=r"^NCCL's header nccl\.h was not found.*HOROVOD_NCCL_HOME"):
        cuda.find_cuda("13.0")


@pytest.mark.parametrize(
    ("driver", "supports", "torch_cuda", "reason"),
    [
        (False, None, "13.0", "no NVIDIA driver was found"),
        (True, (13, 0), None, "the torch that is installed is a CPU build"),
        (True, (12, 8), "13.0", "supports CUDA 12.8, and torch needs CUDA 13.0: install a newer"),
        (True, (12, 4), "12.8", None),
        (True, None, "13.0", None),  # nvidia-smi alone
    ],
)
def test_nccl_is_wanted_where_torch_can_use_a_gpu(
    monkeypatch, driver, supports, torch_cuda, reason
):
    monkeypatch.setattr(cuda, "has_gpu_driver", lambda: driver)
    monkeypatch.setattr(cuda, "driver_cuda", lambda: supports)
    found = cuda.why_no_gpu(torch_cuda)
    assert (reason in found) if reason else found is None


def test_the_gpus_of_this_machine_decide_the_architectures(machine):
    assert cuda.gpu_architectures("12.6") == "75,80,86,89,90"
    assert cuda.gpu_architectures("13.0") == "75,80,86,89,90,100,120"
    program(machine / "bin/nvidia-smi", "echo 12.0; echo 9.0; echo 9.0; echo '[N/A]'")
    assert cuda.gpu_architectures("13.0") == "90,120"


def test_nvidia_s_packages_become_a_toolkit_of_links(machine, monkeypatch):
    """In the environment of a user: the folders that the packages make, with names to link by."""
    nvidia = machine / "site/nvidia"
    found = toolkit(nvidia / "cu13", "13.0")
    for file in ("lib/libcudart.so.13", "nvvm/bin/cicc"):
        (found / file).parent.mkdir(parents=True, exist_ok=True)
        (found / file).touch()
    for file, text in {
        "include/nccl.h": "#define NCCL_MAJOR 2\n#define NCCL_MINOR 29\n#define NCCL_PATCH 7\n",
        "lib/libnccl.so.2": "",
    }.items():
        (nvidia / "nccl" / file).parent.mkdir(parents=True, exist_ok=True)
        (nvidia / "nccl" / file).write_text(text)
    monkeypatch.setattr(cuda, "_nvidia", lambda: [nvidia])
    chosen = cuda.find_cuda("13.0")
    assert str(chosen) == "CUDA 13.0, NCCL 2.29.7, GPU architectures 75,80,86,89,90,100,120"
    assert chosen.toolkit is None
    variables = cuda.build_variables(chosen, machine / "links")
    home, nccl = Path(variables["CUDA_HOME"]), Path(variables["HOROVOD_NCCL_HOME"])
    for link in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so", "lib/libcudart.so",
                 "nvvm/bin/cicc"):  # fmt: skip
        assert (home / link).is_file(), link
    assert (nccl / "lib/libnccl.so").is_file() and (nccl / "include/nccl.h").is_file()
    assert variables["HOROVOD_CUDA_HOME"] == str(home)
    assert variables["PATH"].split(os.pathsep)[0] == f"{home}/bin"


def test_a_compiler_that_pip_cannot_get_is_one_sentence(machine, monkeypatch):
    monkeypatch.setattr(cuda, "_nvidia", list)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"^pip could not install the compiler of CUDA 13\.0 \(.+\)"
    ):
        cuda.link_compiler("13.0", machine / "links")
