"""The table of repairs: each row fits Horovod's real source exactly once, or is refused."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from horovod_lm.install_horovod import cache_folder
from horovod_lm.installation.build import fetch_source
from horovod_lm.installation.repairs import (
    HOROVOD_VERSION,
    REPAIRS,
    Repair,
    apply_repairs,
    repairs_digest,
)
from horovod_lm.utils.errors import UserError

ONE = Repair("one", "a.txt", "old", "new", "because", "none found")


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


def copy_of(released: Path, folder: Path) -> Path:
    """The files that the table names, copied so that a test may change them."""
    for file in {repair.file for repair in REPAIRS}:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((released / file).read_bytes())
    return folder


def digest(folder: Path) -> str:
    """One hash over everything in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(bytes(path) + path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.name)
def test_each_repair_fits_the_released_source_once(released, repair):
    assert (released / repair.file).read_text(encoding="utf-8").count(repair.says) == 1


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.name)
def test_each_repair_says_why_and_where_upstream_speaks_of_it(repair):
    assert repair.name and repair.upstream and len(repair.why) > 20
    assert repair.says != repair.must_say
    assert [other.name for other in REPAIRS].count(repair.name) == 1


def test_the_whole_table_is_applied(released, tmp_path):
    source = copy_of(released, tmp_path)
    apply_repairs(source)
    for repair in REPAIRS:
        assert repair.must_say in (source / repair.file).read_text(encoding="utf-8"), repair.name


def test_nothing_that_runs_needs_distutils_any_more(released, tmp_path):
    source = copy_of(released, tmp_path)
    apply_repairs(source)
    files = [*(released / "horovod").rglob("*.py"), *(released / "horovod").rglob("CMakeLists.txt")]
    for file in files:
        repaired = source / file.relative_to(released)
        text = (repaired if repaired.exists() else file).read_text(encoding="utf-8")
        assert "from distutils" not in text and "import distutils" not in text, file


def test_a_source_that_was_repaired_before_is_refused_and_left_alone(released, tmp_path):
    source = copy_of(released, tmp_path)
    apply_repairs(source)
    before = digest(source)
    with pytest.raises(UserError, match=r"found 0 times, expected once"):
        apply_repairs(source)
    assert digest(source) == before


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.name)
def test_a_source_that_says_it_twice_is_refused_and_left_alone(released, tmp_path, repair):
    source = copy_of(released, tmp_path)
    with (source / repair.file).open("a", encoding="utf-8") as file:
        file.write(repair.says)
    before = digest(source)
    with pytest.raises(UserError, match="found 2 times"):
        apply_repairs(source)
    assert digest(source) == before


def test_a_missing_file_is_named_and_nothing_is_changed(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(UserError, match=r"b\.txt: the file is not there"):
        apply_repairs(tmp_path, (ONE, replace(ONE, file="b.txt")))
    assert (tmp_path / "a.txt").read_text() == "old"


def test_two_repairs_of_one_file_are_both_applied(tmp_path):
    (tmp_path / "a.txt").write_text("old and worse")
    apply_repairs(tmp_path, (ONE, replace(ONE, says="worse", must_say="better")))
    assert (tmp_path / "a.txt").read_text() == "new and better"


@pytest.mark.parametrize("field", ["file", "says", "must_say"])
def test_the_digest_changes_with_what_is_replaced(field):
    assert repairs_digest((ONE,)) != repairs_digest((replace(ONE, **{field: "other"}),))


@pytest.mark.parametrize("field", ["name", "why", "upstream"])
def test_the_digest_does_not_change_with_what_is_only_said(field):
    assert repairs_digest((ONE,)) == repairs_digest((replace(ONE, **{field: "other"}),))
