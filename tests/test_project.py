"""The doors of the project: make, conda, pip and continuous integration say the same."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# What conda brings: what is needed before pip can work. Everything else is pyproject.toml's.
TOOLCHAIN = {"python", "pip", "cxx-compiler", "make", "cmake"}


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
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


def test_versions_stand_in_pyproject_alone(project):
    packages = "|".join(
        name_and_version(requirement)[0]
        for group in (
            project["project"]["dependencies"],
            *project["project"]["optional-dependencies"].values(),
        )
        for requirement in group
    )
    pinned = re.compile(rf"\b({packages})\s*[=~<>]=+\s*\d", re.IGNORECASE)
    for file in ("Makefile", ".ci/run", "README.md"):
        assert not pinned.search((ROOT / file).read_text(encoding="utf-8")), file


def test_help_lists_every_command_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for target in targets:
        assert re.search(rf"^ *{target} +\w+", shown.stdout, re.MULTILINE), target


def test_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("\nmake test")
    assert re.search(r"^\s*make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_readme_links_to_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


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
