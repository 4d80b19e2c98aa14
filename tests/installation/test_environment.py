"""`make setup`: what is missing is said first, finished steps are skipped, broken ones rerun."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.installation import environment, preflight
from horovod_lm.installation.environment import Setup, find_environment, is_at_least, read_pins
from horovod_lm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BOOTSTRAP = ROOT / "horovod_lm" / "installation" / "bootstrap.py"
UNDER_PYTHON_3_8 = """
import runpy, sys
sys.version_info = (3, 8, 18)
runpy.run_path({path!r}, run_name="__main__")
"""


def program(folder: Path, name: str, body: str) -> Path:
    """A shell script that stands where a tool would."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_an_old_python_is_told_in_one_sentence():
    code = UNDER_PYTHON_3_8.format(path=str(BOOTSTRAP))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: Python 3\.10 or newer is needed, and this is 3\.8; .*\n", done.stderr
    )


def test_an_old_python_can_read_the_entry():
    # No annotations, no f-strings, no walrus, no match: whatever arrived after Python 3.5.
    tree = ast.parse(BOOTSTRAP.read_text(encoding="utf-8"), feature_version=(3, 7))
    modern = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match)
    assert not [node for node in ast.walk(tree) if isinstance(node, modern)]
    assert "__future__" not in BOOTSTRAP.read_text(encoding="utf-8")


def test_help_needs_nothing_that_is_not_installed_yet():
    # -I -S: no site-packages at all, as on a fresh machine.
    command = [sys.executable, "-I", "-S", str(BOOTSTRAP), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "TORCH_INDEX_URL" in done.stdout, done.stderr


def test_the_compiler_of_this_machine_passes():
    assert preflight.missing_for_compiling() == []


def test_a_compiler_without_cpp17_is_one_sentence(tmp_path, monkeypatch):
    old = program(tmp_path, "old-c++", 'echo "error: unrecognized option -std=c++17" >&2; exit 1')
    monkeypatch.setenv("CXX", str(old))
    assert re.fullmatch(
        r"the C\+\+ compiler `.*old-c\+\+` does not compile C\+\+17, .*CXX=\.\.\.",
        "\n".join(preflight.missing_for_compiling()),
    )


def test_everything_that_is_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(preflight, "BYTES_FOR_ENVIRONMENT", 1e18)
    with pytest.raises(UserError) as error:
        Setup(tmp_path / "deep" / "venv", []).run()
    lines = str(error.value).splitlines()
    assert lines[0] == "before the set-up can start:"
    assert [line.split(";")[0] for line in lines[1:]] == [
        "- no `make` was found",
        "- no C++ compiler was found",
        lines[3].split(";")[0],
    ]
    assert f"the environment needs 1000000000.0 GB, and {tmp_path} has" in lines[3]
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there, but is no Python environment"):
        Setup(tmp_path, []).run()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_environment_with_an_old_python_is_refused(tmp_path):
    answer = '[[3, 8, 1], "/usr/include", true, null]'
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "python", f"echo '{answer}'")
    with pytest.raises(UserError, match=r"python is Python 3\.8\.1, and 3\.10 or newer is needed"):
        Setup(tmp_path, []).run()


def test_the_environment_of_these_tests_is_found():
    import torch

    found = find_environment(Path(sys.prefix))
    assert found.version == sys.version_info[:3] and found.torch == torch.__version__


def test_the_pins_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = read_pins(ROOT / "pyproject.toml")
    assert pins["torch"] == project["tool"]["horovod-lm"]["torch"]
    assert f"torch>={pins['oldest_torch']}" in project["project"]["dependencies"]
    assert is_at_least(pins["torch"], pins["oldest_torch"])


def test_the_extras_that_are_installed_exist():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(environment.EXTRAS.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("version", "oldest", "will_do"),
    [
        ("2.13.0+cpu", "2.6", True),
        ("2.6.0", "2.6", True),
        ("2.5.1", "2.6", False),
        ("3.0.0a1", "2.6", True),
        (None, "2.6", False),
    ],
)
def test_versions_are_compared_by_number(version, oldest, will_do):
    assert is_at_least(version, oldest) is will_do


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder that looks like an environment in which every step was done."""
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "horovod_lm-0.1.0.dist-info").mkdir(parents=True)
    (packages / "horovod-0.28.1+lm.0123456789ab.dist-info").mkdir()
    for step in ("project", "horovod"):
        Setup(tmp_path, []).mark_done(step)
    return tmp_path


def test_what_was_done_is_not_done_again(finished, capsys):
    Setup(finished, []).run()
    assert "is ready: nothing to do" in capsys.readouterr().out


def test_other_options_of_horovod_are_another_step(finished):
    assert not Setup(finished, ["--mpi"]).is_done("horovod")


def test_a_changed_pyproject_installs_the_project_again(finished, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("root")
    (elsewhere / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n# more\n")
    monkeypatch.setattr(environment, "ROOT", elsewhere)
    assert not Setup(finished, []).is_done("project")


@pytest.mark.parametrize("package", ["horovod_lm-*", "horovod-*"])
def test_a_package_that_was_removed_is_installed_again(finished, package):
    next(finished.glob(f"lib/*/site-packages/{package}")).rmdir()
    step = "project" if package == "horovod_lm-*" else "horovod"
    assert not Setup(finished, []).is_done(step)


def test_stamps_cut_short_are_no_stamps(finished):
    (finished / "horovod_lm-setup.json").write_text('{"project": "01')
    assert not Setup(finished, []).is_done("project")


def test_a_step_that_fails_says_its_last_lines_and_its_log(tmp_path):
    setup = Setup(tmp_path, [])
    setup.log = tmp_path / "log"
    with pytest.raises(UserError, match="numbers could not be installed") as error:
        setup.step(
            "numbers", [sys.executable, "-c", "print(*range(30), sep='\\n'); raise SystemExit(1)"]
        )
    assert "  | 29\n" in str(error.value) and "  | 9\n" not in str(error.value)
    assert str(setup.log) in str(error.value)
    assert "\n9\n" in setup.log.read_text()


def test_a_real_environment_is_made_where_none_is(tmp_path):
    setup = Setup(tmp_path / "venv", [])
    setup.log = tmp_path / "log"
    made = setup.make_environment()
    assert made.has_pip and made.torch is None and made.folder == tmp_path / "venv"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple", "nonsense"])
def test_an_index_that_is_not_there_does_not_answer(url):
    assert environment.answers(url) is False


def test_an_index_that_is_there_answers(tmp_path):
    (tmp_path / "torch").mkdir()
    import functools
    import http.server
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert environment.answers(f"http://127.0.0.1:{server.server_port}/") is True
        server.shutdown()
