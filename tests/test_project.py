"""make, conda, pip, continuous integration and the README agree."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

# conda installs what pip needs to work; everything else is in pyproject.toml.
TOOLCHAIN = {"python", "pip", "cxx-compiler", "make", "cmake"}


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_and_version(requirement: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(?:\[.*\])?\s*(.*)", requirement)
    return match.group(1).lower(), match.group(2).replace(" ", "")


def test_the_conda_environment_holds_the_toolchain_with_the_versions_of_pyproject(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = dict(map(name_and_version, environment["dependencies"]))
    assert set(conda) == TOOLCHAIN
    assert conda.pop("python").split(",")[0] == project["project"]["requires-python"]
    ours = dict(map(name_and_version, project["project"]["dependencies"]))
    assert {name: ours[name] for name in conda if name in ours} == {
        name: version for name, version in conda.items() if name in ours
    }
    assert not any(version for name, version in conda.items() if name not in ours)


def test_the_newest_entry_of_the_changelog_is_the_version_of_the_package(project):
    headings = re.findall("^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == project["project"]["version"]


def test_help_lists_every_command_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for target in targets:
        assert re.search(rf"^ *{target} +\w+", shown.stdout, re.MULTILINE), target


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a shell does, also if make runs the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture
def words(tmp_path) -> str:
    """A program that prints its arguments, one per line; its path has a space."""
    program = tmp_path / "a python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(("venv", "folder"), [("a b", f"{ROOT}/a b"), ("/a b/c  d", "/a b/c  d")])
def test_a_folder_with_blanks_reaches_the_set_up_whole(words, venv, folder):
    said = make("setup", f"PYTHON={words}", f"VENV={venv}").stdout.splitlines()
    assert said[said.index("--venv") + 1] == folder
    assert "--next" in said


def test_without_python_make_ends_with_one_sentence():
    done = make("setup", "PYTHON=no-such-python")
    assert re.fullmatch(
        r"Makefile:\d+: \*\*\* no no-such-python was found; install Python .*\n", done.stderr
    )


def test_the_doctor_needs_no_environment(words, tmp_path):
    said = make("doctor", f"PYTHON={words}", f"VENV={tmp_path}/a b").stdout.splitlines()
    assert said[1:] == ["doctor", "--venv", f"{tmp_path}/a b"]


def test_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").endswith("\nmake test\nmake ray\n")
    assert re.search(r"^\s*make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_readme_links_to_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "tests" / "faults" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 14
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_no_tracked_file_names_a_folder_of_somebodys_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    leak = re.compile(rf"{re.escape(str(ROOT))}|/(?:home|Users)/\w+/|/ro{'ot'}/")
    for name in filter(None, listed.stdout.split("\0")):
        path = Path(ROOT, name)
        if path.suffix in {".png", ".ipynb", ".py", ".md", ".yaml", ".yml", ".toml", ""}:
            content = path.read_bytes() if path.is_file() else b""
            assert not leak.search(content.decode("utf-8", "ignore")), name
