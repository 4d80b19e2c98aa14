"""The installer's command line: what it recognises, what it refuses, and that it does no harm."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from horovod_lm.setup.install_horovod import cache_folder, key_of, only_one, why_not_right

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: python -m horovod_lm.setup.install_horovod",
)


def command(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "horovod_lm.setup.install_horovod", *options],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def pretend_version(folder: Path, version: str) -> str:
    """A PYTHONPATH on which Horovod seems to be installed in `version`."""
    info = folder / f"horovod-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: horovod\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("version", "key"),
    [
        ("0.28.1+lm.0123456789ab", "0123456789ab"),
        ("0.28.1", None),
        ("0.28.1+lm.012", None),
        ("0.28.1+cu12", None),
        (None, None),
    ],
)
def test_a_build_of_ours_is_known_by_its_version(version, key):
    assert key_of(version) == key


def test_what_is_wrong_is_said_for_each_case():
    assert why_not_right(None) == "Horovod is not installed"
    assert "not built by this project" in why_not_right("0.28.1")
    assert "for another torch" in why_not_right("0.28.1+lm.0123456789ab")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOROVOD_LM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("HOROVOD_LM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "horovod_lm"


@pytest.mark.horovod
@needs_horovod
def test_the_installed_build_is_recognised_and_left_alone():
    done = command()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nothing to do: Horovod 0.28.1+lm.")
    assert "is installed and works, with Gloo" in done.stdout


@pytest.mark.horovod
@needs_horovod
def test_check_tries_what_is_installed():
    done = command("--check")
    assert done.returncode == 0, done.stderr
    assert "fits torch" in done.stdout


def test_check_refuses_a_horovod_that_is_not_ours(tmp_path):
    done = command("--check", PYTHONPATH=pretend_version(tmp_path, "0.28.1"))
    assert done.returncode == 2
    assert done.stderr == (
        "error: Horovod 0.28.1 was not built by this project, so it lacks the patches; "
        "run: python -m horovod_lm.setup.install_horovod\n"
    )


def test_check_refuses_a_build_for_another_torch(tmp_path):
    done = command("--check", PYTHONPATH=pretend_version(tmp_path, "0.28.1+lm.0123456789ab"))
    assert done.returncode == 2 and "for another torch" in done.stderr


@pytest.mark.horovod
@needs_horovod
def test_a_build_that_does_not_load_is_found_out(tmp_path):
    package = tmp_path / "horovod" / "torch"
    package.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    done = command("--check", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "Horovod is built but does not work" in done.stderr
    assert "undefined symbol: _ZN3c10" in done.stderr and "--force" in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--jobs 0", "--jobs must be at least 1, not 0"),
        ("--source FILE", "--source needs --target; without it the source is fetched and kept"),
        (
            "--no-nccl --target FOLDER --source FILE",
            "FILE is not horovod 0.28.1 as it was released",
        ),
        ("--target TAKEN", "TAKEN is not empty and not a build of Horovod; name a new folder"),
        ("--target FOLDER --source FOLDER", "--source FOLDER is not a file"),
        ("--force", "Horovod's builds are kept in /dev/null/cache, which cannot be written (Not a"),
    ],
)
def test_impossible_options_are_one_sentence_and_nothing_is_built(tmp_path, options, sentence):
    (tmp_path / "taken").mkdir()
    for file in ("taken/mine.txt", "file"):
        (tmp_path / file).touch()

    def named(text: str) -> str:
        for name in ("FILE", "FOLDER", "TAKEN"):
            text = text.replace(name, str(tmp_path / name.lower()))
        return text

    done = command(*named(options).split(), HOROVOD_LM_CACHE="/dev/null/cache")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {named(sentence)}") and done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_help_teaches():
    said = command("--help").stdout
    for word in ("HOROVOD_LM_CACHE", "--mpi", "--nccl", "--check", "check its hash"):
        assert word in said


HOLD = """
import sys, time
from pathlib import Path
from horovod_lm.setup.install_horovod import only_one
with only_one(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_second_installer_waits_for_the_first(tmp_path, capsys):
    holder = [sys.executable, "-c", HOLD, str(tmp_path), "1.5"]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        with only_one(tmp_path):
            ended = first.poll() if first.poll() is not None else _ends_within(first, 1)
        assert ended == 0, "the second was let in while the first was still inside"
    assert "waiting for it..." in capsys.readouterr().out


def test_an_installer_that_was_killed_does_not_block_the_next(tmp_path):
    holder = [sys.executable, "-c", HOLD, str(tmp_path), "600"]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        first.kill()
    with only_one(tmp_path):
        assert (tmp_path / "lock").exists()


def _ends_within(process: subprocess.Popen[str], seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process.poll()
