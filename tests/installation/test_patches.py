"""The patches fit Horovod's released source, and a source that they do not fit is left alone."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from horovod_lm.install_horovod import cache_folder
from horovod_lm.installation.build import fetch_source
from horovod_lm.installation.patches import (
    HOROVOD_VERSION,
    PATCHES,
    Patch,
    apply_patches,
    patches_digest,
)
from horovod_lm.utils.errors import UserError

ONE = Patch(
    "one", "because", "none found",
    "--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n first\n-old\n+new\n last\n"
    "@@ -9 +9,2 @@\n end\n+more\n",
)  # fmt: skip
TEXT = "first\nold\nlast\n\nend\n"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horovod's source as released, unpacked from the cache that the installation filled."""
    if not (cache_folder() / "sdist").is_dir():
        pytest.skip("no Horovod source in the cache: python -m horovod_lm.install_horovod")
    folder = tmp_path_factory.mktemp("released")
    with tarfile.open(fetch_source(cache_folder())) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder / f"horovod-{HOROVOD_VERSION}"


def digest(folder: Path) -> str:
    """One hash over everything in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(bytes(path) + path.read_bytes() for path in files)).hexdigest()


def test_every_patch_fits_the_released_source_once_and_says_why(released):
    for patch in PATCHES:
        assert patch.name and patch.upstream and len(patch.why) > 20, patch
        assert patch.hunks() and all(old != new for _, old, new in patch.hunks()), patch.name
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    apply_patches(released)
    for file in [*(released / "horovod").rglob("*.py"), *released.rglob("CMakeLists.txt")]:
        text = file.read_text(encoding="utf-8")
        assert "from distutils" not in text and "import distutils" not in text, file
    before = digest(released)
    with pytest.raises(UserError, match="were found 0 times instead of once"):
        apply_patches(released)  # a second time
    assert digest(released) == before


def test_the_hunks_of_a_file_are_all_applied(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    apply_patches(tmp_path, (ONE, replace(ONE, diff=ONE.diff.replace("new", "newer").replace(
        "old", "new").replace("+more", "+even more"))))  # fmt: skip
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
    second = replace(ONE, diff=ONE.diff.replace("a.txt", "b.txt"))
    with pytest.raises(UserError, match=rf"^the patch 'one' does not fit b\.txt: .* {times} times"):
        apply_patches(tmp_path, (ONE, second))
    assert digest(tmp_path) == before


def test_the_digest_changes_with_the_diff_alone():
    assert patches_digest((ONE,)) != patches_digest((replace(ONE, diff=ONE.diff + " x\n"),))
    assert patches_digest((ONE,)) == patches_digest((replace(ONE, why="other", name="other"),))
