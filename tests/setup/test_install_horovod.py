"""The installer's command line: what it recognises, what it refuses, and that it does no harm."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.setup import install_horovod
from horovod_lm.setup.build import try_build
from horovod_lm.setup.install_horovod import installed_version, key_of
from horovod_lm.setup.toolchain import inspect_toolchain
from horovod_lm.utils.errors import UserError


@pytest.fixture
def main(monkeypatch):
    """The command line in this process, whose signals stay as they are."""
    monkeypatch.setattr(install_horovod, "interrupt_on_termination", lambda: None)
    return install_horovod.main


@pytest.mark.horovod
def test_a_right_build_is_recognised_installed_or_in_a_target(tmp_path, main, capsys):
    if key_of(installed_version()) != inspect_toolchain().key:  # it would be replaced
        pytest.skip("Horovod was built with other patches or options: make setup")
    command = [sys.executable, "-m", "horovod_lm.setup.install_horovod"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nothing to do: Horovod 0.28.1+lm.")
    for path in Path(importlib.util.find_spec("horovod").origin).parents[1].iterdir():
        if path.name == "horovod" or path.name.startswith("horovod-"):
            (tmp_path / path.name).symlink_to(path)
    main(["--target", str(tmp_path)])
    assert capsys.readouterr().out == done.stdout


@pytest.mark.parametrize(
    ("version", "key"), [("0.28.1", None), ("0.28.1+lm.0123456789ab", "0123456789ab")]
)
def test_another_build_is_told_apart(tmp_path, version, key):
    assert installed_version(tmp_path) is None
    info = tmp_path / f"horovod-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: horovod\nVersion: {version}\n")
    assert key_of(installed_version(tmp_path)) == key


@pytest.mark.horovod
def test_a_build_that_does_not_load_is_found_out(tmp_path):
    package = tmp_path / "horovod" / "torch"
    package.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    reason = r"^Horovod is built but .* \(ImportError: undefined symbol: .* options and --force$"
    with pytest.raises(UserError, match=reason):
        try_build(inspect_toolchain(), tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--jobs 0", "--jobs must be at least 1, not 0"),
        ("--force", "Horovod's builds are kept in /dev/null/cache, which cannot be written (Not a"),
    ],
)
def test_impossible_options_are_one_sentence(main, monkeypatch, capsys, options, sentence):
    monkeypatch.setenv("HOROVOD_LM_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}") as error:
        main(options.split())
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""
