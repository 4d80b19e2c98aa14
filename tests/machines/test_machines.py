"""`make machines` without a root: how its rows are written, and that its tests are there."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines.machines import PROJECT, TESTS, Row

OPTIONS = argparse.Namespace(cache=Path("cache"))


def test_a_row_is_a_suite_with_a_compiler_and_a_python(tmp_path):
    (tmp_path / "3.12.1/bin").mkdir(parents=True)
    (tmp_path / "3.12.1/bin/python3").touch()
    row = Row("trixie", OPTIONS)
    assert (row.name, row.compiler, row.python) == ("trixie", None, None)
    row = Row("forky:g++-15:python3.13", OPTIONS)
    assert (row.suite, row.compiler, row.python) == ("forky", "g++-15", "python3.13")
    row = Row(f"bookworm:python={tmp_path}/3.12.1", OPTIONS)
    assert (row.compiler, row.folder) == (None, tmp_path / "3.12.1")
    assert row.name == "bookworm_python-3.12.1"  # in the table: no path of this machine


@pytest.mark.parametrize("text", ["", "Trixie", "trixie:g++-11:g++-12", "trixie:python=/nowhere"])
def test_a_wrong_row_is_one_sentence_before_anything_starts(text):
    command = [sys.executable, str(PROJECT / "tests/machines/machines.py"), "bookworm", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {text!r}") and done.stderr.count("\n") == 1


def test_the_tests_that_it_runs_are_there():
    for test in TESTS.split():
        file, _, name = test.partition("::")
        assert (PROJECT / file).exists(), file
        assert not name or f"def {name}(" in (PROJECT / file).read_text(), test
