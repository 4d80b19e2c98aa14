"""The patches fit Horovod's released source, and a source that they do not fit is left alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from horovod_lm.setup.build import fetch_source
from horovod_lm.setup.install_horovod import cache_folder
from horovod_lm.setup.patches import HOROVOD_VERSION, PATCHES, Patch, apply_patches
from horovod_lm.setup.toolchain import find_cmake
from horovod_lm.utils.errors import UserError

ONE = Patch(
    "one", "because", "none found",
    "--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n first\n-old\n+new\n last\n"
    "@@ -9 +9,2 @@\n end\n+more\n",
)  # fmt: skip
TEXT = "first\nold\nlast\n\nend\n"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horovod's source, unpacked from the cache that the installation filled, and patched."""
    if not (cache_folder() / "sdist").is_dir():
        pytest.skip("no Horovod source in the cache: python -m horovod_lm.setup.install_horovod")
    folder = tmp_path_factory.mktemp("released")
    with tarfile.open(fetch_source(cache_folder())) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    apply_patches(folder / f"horovod-{HOROVOD_VERSION}")
    return folder / f"horovod-{HOROVOD_VERSION}"


def digest(folder: Path) -> str:
    """One hash over everything in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(bytes(path) + path.read_bytes() for path in files)).hexdigest()


def test_every_patch_says_why_and_fits_the_released_source_once(patched):
    for patch in PATCHES:
        assert patch.name and patch.upstream and len(patch.why) > 20, patch
    before = digest(patched)
    with pytest.raises(UserError, match="were found 0 times instead of once"):
        apply_patches(patched)  # a second time
    assert digest(patched) == before


def test_nothing_that_runs_needs_distutils(patched):
    for file in [*(patched / "horovod").rglob("*.py"), *patched.rglob("CMakeLists.txt")]:
        text = file.read_text(encoding="utf-8")
        assert "from distutils" not in text and "import distutils" not in text, file


CUDA_TORCH = """
import sys, types
torch = sys.modules[__name__]
__version__ = "2.13.0"
version = types.SimpleNamespace(cuda="13.0", hip=None)
compiled_with_cxx11_abi = lambda: True
"""
EXTENSIONS = """
import types
CUDA_HOME, ROCM_HOME = "/usr/local/cuda", None  # as where any nvcc is on PATH
def CppExtension(name, sources):
    return types.SimpleNamespace(include_dirs=[], library_dirs=[], libraries=[])
CUDAExtension = CppExtension
"""


@pytest.mark.parametrize("asked", [False, True])
def test_cuda_is_used_only_where_it_is_asked_for(patched, tmp_path, asked):
    """19-cuda-on-request: Horovod's own question to a torch that was built with CUDA."""
    for name, text in {"__init__": CUDA_TORCH, "utils/cpp_extension": EXTENSIONS}.items():
        (tmp_path / f"torch/{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"torch/{name}.py").write_text(text)
    script = tmp_path / "ask.cmake"
    script.write_text(
        f'set(PY_EXE "{sys.executable}")\n'
        f'include("{patched}/cmake/Modules/FindPytorch.cmake")\n'
        'message("${Pytorch_EXT}")\n'
    )
    env = {name: text for name, text in os.environ.items() if not name.startswith("HOROVOD_")}
    env |= {"PYTHONPATH": str(tmp_path)} | ({"HOROVOD_CUDA_HOME": "/opt/cuda"} if asked else {})
    done = subprocess.run(
        [find_cmake(), "-P", str(script)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.split()[-1] == ("CUDAExtension" if asked else "CppExtension"), done.stderr


def test_the_hunks_of_a_file_are_all_applied(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    diff = ONE.diff.replace("new", "newer").replace("old", "new").replace("+more", "+even more")
    apply_patches(tmp_path, (ONE, ONE._replace(diff=diff)))
    assert (tmp_path / "a.txt").read_text() == "first\nnewer\nlast\n\nend\neven more\nmore\n"


@pytest.mark.parametrize(
    ("other", "times"),
    [
        (None, 0),  # the file is missing
        (TEXT.replace("end", "the end"), 0),  # a part of a line is no match
        (TEXT + "end\n", 2),
    ],
)
def test_a_source_that_does_not_fit_is_one_sentence_and_left_alone(tmp_path, other, times):
    (tmp_path / "a.txt").write_text(TEXT)
    if other is not None:
        (tmp_path / "b.txt").write_text(other)
    before = digest(tmp_path)
    second = ONE._replace(diff=ONE.diff.replace("a.txt", "b.txt"))
    with pytest.raises(UserError, match=rf"^the patch 'one' does not fit b\.txt: .* {times} times"):
        apply_patches(tmp_path, (ONE, second))
    assert digest(tmp_path) == before
