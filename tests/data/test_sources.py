"""Corpora: the text of each source, its order, and the errors of missing text."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.prepare import prepare_data
from horovod_lm.data.sources import open_corpus, read_text_file
from horovod_lm.utils.config import config_from_dict
from horovod_lm.utils.errors import DataError

TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def texts(config) -> list[str]:
    return ["".join(document.pieces()) for document in open_corpus(config).documents()]


def test_the_python_corpus_is_the_standard_library_without_tests_packages_and_generated_files(
    make_config,
):
    documents = list(open_corpus(make_config(source="python")).documents())
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [Path(document.name).relative_to(root) for document in documents]
    assert {Path("argparse.py"), Path("json/decoder.py"), Path("unittest/case.py")} <= set(paths)
    assert paths == sorted(paths)
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
    assert all(left_out.isdisjoint(path.parts) for path in paths)
    assert 5e6 < sum(document.size for document in documents) < 5e7


@pytest.fixture
def library(tmp_path):
    """A folder with three texts, an empty file, and two that are no texts of it."""
    files = {"a.md": b"first", "b.txt": b"second", "more/c.txt": b"third", "empty.txt": b"",
             ".hidden": b"\xff\xfe", "prepared/train.bin": b"\xff\xff"}  # fmt: skip
    for name, content in files.items():
        (tmp_path / "library" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "library" / name).write_bytes(content)
    return tmp_path / "library"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("library", ["first", "second", "third"]),
        ("library/b.txt", ["second"]),
        ("library/*.txt", ["second"]),
        ("library/**/*.txt", ["second", "third"]),
        (["library/more", "library/b.txt", "library/*.txt"], ["second", "third"]),
    ],
)
def test_files_of_a_file_a_folder_a_glob_or_a_list_are_read_once_in_order(
    make_config, library, path, expected
):
    config = make_config(source="files", path=path, data_dir="library/prepared")
    assert texts(config) == expected


NAMES = ["[2024] books", "x*?", "Chapter 1: {a}", "it's #1", " blank ", "本\n\x85", "-rf", "**"]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"not UTF-8: \xff")], ids=ascii)
def test_every_character_of_a_name_is_taken_literally(tmp_path, name):
    (tmp_path / name / "texts" / name).mkdir(parents=True)
    (tmp_path / name / "texts" / name / f"{name}.txt").write_text("text")
    paths = ["texts", "texts/*/*.txt", "texts/**/*.txt", "te[x]ts/**"]
    if "UTF-8" not in name:
        paths += [f"texts/{name}", f"texts/{name}/{name}.txt", f"texts/{name}/*.txt"]
    for path in paths:
        config = config_from_dict({"data": {"source": "files", "path": path}}, tmp_path / name)
        assert texts(config) == ["text"]


def test_links_are_followed_and_each_folder_is_read_once(make_config, library, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("fourth")
    for link, target in {"link": "../elsewhere", "again": "../elsewhere", "up": "..", "loop": ".",
                         "more/up": "..", "broken": "nowhere", "self": "self"}.items():  # fmt: skip
        (library / link).symlink_to(target)
    for path in ("library", "library/**/*"):
        config = make_config(source="files", path=path, data_dir="library/prepared")
        assert sorted(texts(config)) == ["first", "fourth", "second", "third"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere/*.txt", r"data.path nowhere/\*.txt: no such file or match"),
        (["library/b.txt", "nowhere.txt"], "data.path nowhere.txt: no such file or match"),
        ("nothing", "data.path nothing: the folder has no files"),
        ("/dev/null", "data.path /dev/null is neither a file nor a folder"),
        ("library/b.txt/x", "b.txt cannot be read: Not a directory"),
        ("x" * 300, "xxx cannot be read: File name too long"),
        ("secret", "secret cannot be read: Permission denied"),
        ("secret/a.txt", "secret/a.txt cannot be read: Permission denied"),
        ("library/secret*/*", "secret cannot be read: Permission denied"),
        ("hidden.txt", "hidden.txt cannot be read: Permission denied"),
    ],
)
def test_text_that_cannot_be_read_is_a_sentence(unprivileged, path, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        texts(config_from_dict({"data": {"source": "files", "path": path}}, unprivileged))
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(text=st.text(TEXT, max_size=200), piece_bytes=st.integers(1, 40))
def test_a_file_is_read_exactly_whatever_the_size_of_the_pieces(
    tmp_path_factory, text, piece_bytes
):
    text = text.removeprefix("\N{BYTE ORDER MARK}")
    file = tmp_path_factory.mktemp("text") / "text.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        pieces = list(read_text_file(file, piece_bytes))
        assert "".join(pieces) == text and all(pieces)
    file.write_text("one line\n" * 20)
    assert all(piece.endswith("\n") for piece in read_text_file(file, piece_bytes + 9))


@settings(deadline=None)
@given(
    before=st.text(TEXT, max_size=60),
    bad=st.sampled_from([b"\xff", b"\xc3(", b"\xe2\x82", b"\xed\xa0\x80", b"\xf0\x9f\xa6"]),
    after=st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=20),
    piece_bytes=st.integers(1, 40),
)
def test_a_bad_byte_names_the_file_and_the_offset(
    tmp_path_factory, before, bad, after, piece_bytes
):
    data = before.encode() + bad + after.encode()
    file = tmp_path_factory.mktemp("text") / "bad.txt"
    file.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as expected:
        data.decode()
    with pytest.raises(DataError) as caught:
        list(read_text_file(file, piece_bytes))
    offset = expected.value.start
    said = str(caught.value)
    assert f"{file} is not UTF-8 text: byte 0x{data[offset]:02x} at offset {offset} " in said
    assert "\n" not in said


def test_a_zero_byte_is_text_but_utf_16_is_not(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"zero: \0, old Mac's line ends\r" * 9)
    assert "".join(read_text_file(file)) == "zero: \0, old Mac's line ends\r" * 9
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        file.write_text("two bytes for each letter", encoding)
        with pytest.raises(DataError, match=r"text.txt is not UTF-8 text: \d+ of its first \d+ by"):
            list(read_text_file(file))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read")
def test_a_disk_that_fails_while_a_file_is_read_names_the_file():
    with pytest.raises(DataError, match="/proc/self/mem cannot be read: Input/output error"):
        list(read_text_file(Path("/proc/self/mem")))


def test_max_bytes_keeps_whole_documents_and_cuts_a_first_one_that_is_too_large(
    make_config, tmp_path
):
    everything = texts(make_config())
    limit = len("".join(everything[:10])) + 5
    assert texts(make_config(max_bytes=limit)) == everything[:10]
    (tmp_path / "book.txt").write_text("ä" * 1000)
    assert texts(make_config(source="files", path="book.txt", max_bytes=101)) == ["ä" * 50]


def test_the_hub_without_its_library_is_a_sentence(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    config = make_config(source="hub", hub_dataset="someone/something")
    with pytest.raises(DataError, match=r"needs the library 'datasets': pip install 'horovod_lm"):
        texts(config)


@pytest.fixture
def write_dataset(tmp_path):
    """Write rows of text as a local dataset in `folder`: JSON lines, or as the library saves it."""
    datasets = pytest.importorskip("datasets")

    def write(folder: str, splits: dict[str, list[str]], saved: bool = False) -> None:
        (tmp_path / folder).mkdir()
        for name, rows in splits.items():
            lines = [json.dumps({"text": row}) + "\n" for row in rows]
            (tmp_path / folder / f"{name}.jsonl").write_text("".join(lines))
        if saved:
            loaded = datasets.load_dataset(str(tmp_path / folder), cache_dir=tmp_path / "cache")
            shutil.rmtree(tmp_path / folder)
            (loaded if len(splits) > 1 else loaded["train"]).save_to_disk(tmp_path / folder)

    return write


@pytest.mark.parametrize("saved", [False, True])
def test_a_local_copy_of_a_dataset_is_read(make_config, tmp_path, write_dataset, saved):
    write_dataset("rows", {"train": ["first", "", " = Not WikiText = "]}, saved)
    config = make_config(source="hub", hub_dataset="rows")
    assert texts(config) == ["first", " = Not WikiText = "]
    before = open_corpus(config).fingerprint
    (tmp_path / "rows" / "another.jsonl").write_text('{"text": "third"}')
    assert open_corpus(config).fingerprint != before
    with pytest.raises(DataError, match="no field 'story': set data.hub_text_field to one of text"):
        texts(make_config(source="hub", hub_dataset="rows", hub_text_field="story"))


def test_brackets_in_the_path_of_a_dataset_are_refused_only_where_its_library_fails(
    make_config, tmp_path, write_dataset
):
    for folder, saved in (("rows", False), ("saved", True)):
        write_dataset(folder, {"train": ["text"]}, saved)
        (tmp_path / folder).rename(tmp_path / f"[1] {folder}")
    with pytest.raises(DataError, match="brackets in a path .*: rename the folder"):
        texts(make_config(source="hub", hub_dataset="[1] rows"))
    assert texts(make_config(source="hub", hub_dataset="[1] saved")) == ["text"]


WIKITEXT = {
    "train": [
        "", " = Valkyria = \n", "", " It is a game . \n", " = = Gameplay = = \n", " More text . \n",
        "", " = 1 = 2 = \n", " The second article . \n",
    ],
    "validation": ["", " = Homarus = \n", "", " It is a lobster . \n"],
}  # fmt: skip


@pytest.mark.parametrize("saved", [False, True])
def test_rows_of_wikitext_are_joined_to_articles_and_its_validation_split_is_used(
    make_config, write_dataset, saved
):
    write_dataset("wiki", WIKITEXT, saved)
    config = make_config(source="hub", hub_dataset="wiki", max_seq_len=16)
    corpus = open_corpus(config)
    assert texts(config) == [
        " = Valkyria = \n\n It is a game . \n = = Gameplay = = \n More text . \n\n",
        " = 1 = 2 = \n The second article . \n",
    ]
    [article] = corpus.validation()
    assert "".join(article.pieces()) == " = Homarus = \n\n It is a lobster . \n"

    metadata = prepare_data(config)
    assert metadata["split"] == "the dataset's own validation split"
    assert [metadata[part]["documents"] for part in ("train", "val")] == [2, 1]
    assert metadata["val"]["bytes"] == article.size


def test_a_dataset_that_cannot_be_loaded_is_a_sentence(make_config, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server
    with pytest.raises(DataError, match="nobody/no-such-dataset cannot be read") as caught:
        texts(make_config(source="hub", hub_dataset="nobody/no-such-dataset"))
    assert "\n" not in str(caught.value)
