"""Preparing data: atomic, once, deterministic, in constant memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from horovod_lm.data import get_dataloaders, prepare_data
from horovod_lm.data.prepare import FILES, publish, read_metadata
from horovod_lm.data.synthetic.stories import generate_stories
from horovod_lm.data.tokenizers import load_tokenizer
from horovod_lm.utils.config import Config, save_config
from horovod_lm.utils.errors import DataError


def folder_of(config: Config) -> Path:
    return config.resolve(config.data.data_dir)


def contents(config: Config) -> dict[str, bytes]:
    return {name: (folder_of(config) / name).read_bytes() for name in FILES}


def documents_in(config: Config, part: str) -> list[str]:
    """Read the documents back from a token file."""
    folder = folder_of(config)
    metadata, tokenizer = read_metadata(folder), load_tokenizer(folder / "tokenizer.json")
    tokens = np.fromfile(folder / f"{part}.bin", dtype=metadata["dtype"])
    ends = np.flatnonzero(tokens == tokenizer.eot_id)
    assert ends[0] == 0 and ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)]


def is_prepared_again(config: Config) -> bool:
    phases: list[str] = []
    prepare_data(config, lambda phase, done: phases.append(phase))
    return bool(phases)


@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_every_document_is_in_one_part_once_and_the_files_are_deterministic(make_config, name):
    config = make_config(tokenizer=name, num_stories=300, val_fraction=0.1)
    metadata = prepare_data(config)
    assert metadata == read_metadata(folder_of(config))
    stories = list(generate_stories(300, config.seed))
    documents = {part: documents_in(config, part) for part in ("train", "val")}
    assert sorted(documents["train"] + documents["val"]) == sorted(stories)
    assert not set(documents["train"]) & set(documents["val"])
    assert len(documents["val"]) == pytest.approx(30, abs=4 * 300**0.5 * 0.3)
    for part, texts in documents.items():
        data = (folder_of(config) / f"{part}.bin").read_bytes()
        assert metadata[part] == {
            "documents": len(texts),
            "tokens": len(data) // 2,
            "bytes": sum(map(len, texts)),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    tokenizer = load_tokenizer(folder_of(config) / "tokenizer.json")
    lengths = [len(tokenizer.encode(story)) + 1 for story in stories]  # and end-of-text
    assert metadata["stories"]["tokens_per_story"] == pytest.approx(np.mean(lengths), abs=1e-3)
    again = make_config(tokenizer=name, num_stories=300, val_fraction=0.1, data_dir="elsewhere")
    prepare_data(again)
    assert contents(again) == contents(config)


def test_nothing_is_done_when_nothing_has_changed(make_config):
    config = make_config()
    assert is_prepared_again(config)
    assert not is_prepared_again(make_config(batch=8, num_workers=2, vocab_size=999))
    (folder_of(config) / ".lock").unlink()
    (folder_of(config) / ".lock").mkdir()  # locking fails, as in a read-only folder
    assert not is_prepared_again(config)
    with pytest.raises(DataError, match="cannot be written to .*prepared"):
        prepare_data(make_config(seed=8))


CHANGES = {"seed": 8, "num_stories": 101, "val_fraction": 0.2, "max_seq_len": 17,
           "max_bytes": 9000, "tokenizer": "bpe"}  # fmt: skip


def test_data_of_other_settings_are_refused_by_name_and_prepared_again(make_config):
    for key, value in CHANGES.items():
        prepare_data(make_config())
        config = make_config(**{key: value})
        with pytest.raises(DataError, match=rf"{key}=.* configuration has {value}"):
            get_dataloaders(config, 0, 1)
        assert is_prepared_again(config)


def test_a_changed_text_file_prepares_again_and_a_failure_keeps_the_old_data(make_config, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("a line of text\n" * 100)
    config = make_config(source="files", path="book.txt", data_dir=".")
    assert is_prepared_again(config) and not is_prepared_again(config)
    text.write_text("a line of text\n" * 100 + "one more line\n")
    assert is_prepared_again(config)
    split = read_metadata(folder_of(config))["split"]
    assert split == "the end of the one document is for validation"
    assert "one more line" in "".join(documents_in(config, "val"))
    old = contents(config)
    with text.open("ab") as stream:
        stream.write(b"\xff bad")
    with pytest.raises(DataError, match="book.txt is not UTF-8"):
        prepare_data(config)
    assert contents(config) == old
    assert not (folder_of(config) / ".partial").exists() and text.exists()


def test_incomplete_data_are_prepared_again(make_config, tmp_path):
    config = make_config()
    prepare_data(config)
    whole, folder = contents(config), folder_of(config)

    def publish_one_file_of_another_preparation():
        (tmp_path / "another").mkdir()
        shutil.copy(folder / "train.bin", tmp_path / "another")
        with pytest.raises(FileNotFoundError):
            publish(tmp_path / "another", folder)

    for damage in (
        *((folder / name).unlink for name in FILES),
        lambda: os.truncate(folder / "train.bin", 10),
        lambda: (folder / "tokenizer.json").write_text('{"name": "gpt2"}'),
        publish_one_file_of_another_preparation,
    ):
        damage()
        assert read_metadata(folder) is None
        with pytest.raises(DataError, match="no prepared data"):
            get_dataloaders(config, 0, 1)
        prepare_data(config)
        assert contents(config) == whole


def test_a_killed_preparation_keeps_the_old_data(make_config, tmp_path):
    config = make_config()
    prepare_data(config)
    old = contents(config)
    long = save_config(make_config(num_stories=40_000), tmp_path / "configs" / "long.yaml")
    command = [sys.executable, "-m", "horovod_lm.data", "--config", str(long)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    partial = folder_of(config) / ".partial" / "train.bin"
    while not (partial.exists() and partial.stat().st_size > 100_000):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert partial.exists()
    assert contents(config) == old
    assert not is_prepared_again(config)  # the old data are complete
    prepare_data(make_config(num_stories=101))  # the killed process holds no lock
    assert sorted(path.name for path in folder_of(config).iterdir()) == sorted([*FILES, ".lock"])


def test_the_published_files_and_their_folder_are_synced(make_config, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    config = make_config()
    prepare_data(config)
    folder = folder_of(config)
    assert {path.stat().st_ino for path in (folder, *map(folder.joinpath, FILES))} <= synced


def test_two_processes_at_once_prepare_once(make_config, tmp_path):
    config = make_config(num_stories=3000)
    file = save_config(config, tmp_path / "configs" / "both.yaml")
    command = [sys.executable, "-m", "horovod_lm.data", "--config", str(file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0].startswith("nothing has changed: the data exist")
    assert outputs[1].startswith("reading: 0%") and "prepared in" in outputs[1]


def test_a_bpe_is_trained_on_training_text_only(make_config, tmp_path):
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"{'x' * index}word{chr(97 + index) * 9} " * 50)
    config = make_config(
        source="files", path="*.txt", tokenizer="bpe", vocab_size=2000, val_fraction=0.2
    )
    prepare_data(config)
    tokenizer = load_tokenizer(folder_of(config) / "tokenizer.json")
    for part, least, most in (("train", 1, 2), ("val", 3, 99)):
        for document in documents_in(config, part):
            word = " " + document.split()[0]
            assert least <= len(tokenizer.encode(word)) <= most, (part, word)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_corpus(make_config, tmp_path):
    line = "All work and no play makes a very long book of the same line.\n"
    script = (
        "import sys; from horovod_lm.data.__main__ import main; main(sys.argv[1:]);"
        "print(*(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    )
    peaks = []
    for megabytes in (2, 24):
        (tmp_path / "book.txt").write_text(line * (megabytes * 1_000_000 // len(line)))
        config = make_config(source="files", path="book.txt", data_dir=f"data{megabytes}")
        file = save_config(config, tmp_path / "configs" / f"{megabytes}.yaml")
        command = [sys.executable, "-c", script, "--config", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-2]) / 1024)  # kB -> MB
    assert peaks[1] - peaks[0] < 11, peaks  # MB: half of the text that was added


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": "empty.txt", "tokenizer": "bpe"}, "empty.txt contains no text"),
        ({"path": "tiny.txt"}, r"tiny.txt gives \d+ training tokens, fewer than one block of 100"),
        ({"vocab_size": 200}, "byte has 257 tokens, but .* is 200: set model.vocab_size=257"),
        ({"data_dir": "tiny.txt/data"}, "cannot be written to .*tiny.txt/data"),
    ],
)
def test_data_that_cannot_be_prepared_are_a_sentence(make_config, tmp_path, settings, sentence):
    (tmp_path / "tiny.txt").write_text("tiny text")
    (tmp_path / "empty.txt").write_text("")
    config = make_config(max_seq_len=100, source="files", **{"path": "tiny.txt", **settings})
    with pytest.raises(DataError, match=sentence):
        prepare_data(config)
    assert not list(tmp_path.glob("prepared/metadata.json")) + list(tmp_path.glob("*/.partial"))
