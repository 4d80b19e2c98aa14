"""The installer's command line: what it recognises, what it refuses, and that it does no harm."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.setup import install_horovod
from horovod_lm.setup.install_horovod import cache_folder
from horovod_lm.utils.errors import UserError

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


@pytest.fixture
def main(monkeypatch):
    """The command line in this process, whose signals stay as they are."""
    monkeypatch.setattr(install_horovod, "interrupt_on_termination", lambda: None)
    return install_horovod.main


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOROVOD_LM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("HOROVOD_LM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "horovod_lm"


@pytest.mark.horovod
@needs_horovod
def test_a_right_build_is_recognised_installed_or_in_a_target(tmp_path):
    done = command()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nothing to do: Horovod 0.28.1+lm.")
    assert "is installed and works, with Gloo" in done.stdout
    for path in Path(importlib.util.find_spec("horovod").origin).parents[1].iterdir():
        if path.name == "horovod" or path.name.startswith("horovod-"):
            (tmp_path / path.name).symlink_to(path)
    done = command("--check", "--target", str(tmp_path))
    assert done.returncode == 0 and "fits torch" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (
            "0.28.1",
            r"^Horovod 0\.28\.1 was not built by this project, so it lacks the patches; "
            r"run: \S*python -m horovod_lm\.setup\.install_horovod --no-nccl$",
        ),
        ("0.28.1+lm.0123456789ab", "was built with other patches or options, or for another torch"),
    ],
)
def test_check_refuses_another_build(tmp_path, main, monkeypatch, version, said):
    info = tmp_path / f"horovod-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: horovod\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=said):
        main(["--check", "--no-nccl"])


@pytest.mark.horovod
@needs_horovod
def test_a_build_that_does_not_load_is_found_out(tmp_path, main, monkeypatch):
    package = tmp_path / "horovod" / "torch"
    package.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reason = r"^Horovod is built but .* \(ImportError: undefined symbol: .* options and --force$"
    with pytest.raises(UserError, match=reason):
        main(["--check"])


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
def test_impossible_options_are_one_sentence_and_nothing_is_built(
    tmp_path, main, monkeypatch, capsys, options, sentence
):
    (tmp_path / "taken").mkdir()
    for file in ("taken/mine.txt", "file"):
        (tmp_path / file).touch()

    def named(text: str) -> str:
        for name in ("FILE", "FOLDER", "TAKEN"):
            text = text.replace(name, str(tmp_path / name.lower()))
        return text

    monkeypatch.setenv("HOROVOD_LM_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match=f"^{re.escape(named(sentence))}") as error:
        main(named(options).split())
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
