"""`make setup`: what is missing is said first, finished steps are skipped, nothing is destroyed."""

from __future__ import annotations

import ast
import functools
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horovod_lm.setup import environment
from horovod_lm.setup.bootstrap import OLDEST
from horovod_lm.setup.cuda import numbers
from horovod_lm.setup.environment import (
    MARK,
    Setup,
    find_environment,
    former_folder,
    next_steps,
    read_pins,
    torch_source,
)
from horovod_lm.utils.errors import UserError
from tests.conftest import ROOT

BOOTSTRAP = ROOT / "horovod_lm" / "setup" / "bootstrap.py"
PATCHES = "horovod_lm/setup/patches"
UNDER_PYTHON_3_8 = """
import runpy, sys
sys.version_info = (3, 8, 18)
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real environment, as set-up creates it, in a path with a space."""
    setup = Setup(tmp_path_factory.mktemp("a b") / "env")
    with setup.hold():
        found = setup.make_environment()
    assert found.has_pip and found.torch is None and not setup.temporary.exists()
    return setup.folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of that environment which a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "env", symlinks=True))


def test_an_old_python_reads_the_entry_and_gets_one_sentence():
    code = UNDER_PYTHON_3_8.format(path=str(BOOTSTRAP))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    sentence = r"error: Python 3\.10 or newer is needed, and this is 3\.8; .*PYTHON=python3\.10\n"
    assert re.fullmatch(sentence, done.stderr)
    # It also runs with Python 2.7: none of what came after.
    tree = ast.parse(BOOTSTRAP.read_text(encoding="ascii"), feature_version=(3, 7))
    modern = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match)
    assert not [node for node in ast.walk(tree) if isinstance(node, modern)]
    assert "__future__" not in BOOTSTRAP.read_text(encoding="ascii")


def test_help_needs_nothing_that_is_not_installed_yet():
    # -I -S: no site-packages at all, as on a fresh machine.
    command = [sys.executable, "-I", "-S", str(BOOTSTRAP), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "TORCH_INDEX_URL" in done.stdout, done.stderr


def test_everything_that_is_missing_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOROVOD_LM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(environment, "BYTES_FOR_PROJECT", (1e18, 0))
    with pytest.raises(UserError) as error:
        Setup(tmp_path / "deep" / "venv").run()
    first, *lines = str(error.value).splitlines()
    assert first == "before the set-up can start:"
    expected = [
        r"- no `make` was found; .*",
        r"- no C\+\+ compiler was found; .*",
        r"- \S+/file/cache cannot be written; .* make setup HOROVOD_LM_CACHE=\.\.\.",
        r"- 100\d{7}\.\d GB are needed on the disk of \S+, and .* GB are free; .* VENV=.*",
    ]
    assert len(lines) == len(expected)
    assert all(map(re.fullmatch, expected, lines)), lines
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("file", "body", "said"),
    [
        ("env/thesis.txt", "", "env has files but no Python environment, so it stays as it is"),
        ("env", "", "env has files but no Python environment, so it stays as it is"),
        ("env/bin/python", "echo out of luck >&2; exit 1", r"not run \(out of luck\), and nothing"),
        (
            "env/bin/python",
            f"echo 'good morning'; echo '{MARK}[[3, 8, 1], \"/\", true, null]'; echo bye",
            r"python is Python 3\.8\.1, and 3\.10 or newer is needed",
        ),
    ],
)
def test_what_the_set_up_did_not_make_is_left_alone(tmp_path, file, body, said):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        Setup(tmp_path / "env").run()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_python_that_prints_at_its_start_is_understood(made, copied):
    [packages] = copied.glob("lib/python3.*/site-packages")
    noise = packages / "sitecustomize.py"
    noise.write_text("import atexit; print('welcome', end=''); atexit.register(print, 'bye')\n")
    assert find_environment(copied).include == find_environment(made).include


def test_an_environment_whose_python_is_gone_is_made_again_and_keeps_the_users_files(copied):
    (copied / "notes.txt").write_text("years of work")
    (copied / "bin" / "python").unlink()
    (copied / "bin" / "python").symlink_to("/no/such/python3.9")
    setup = Setup(copied)
    assert setup.may_be_made()
    with setup.hold():
        setup.make_environment()
    assert (copied / "notes.txt").read_text() == "years of work"
    subprocess.run([copied / "bin" / "python", "-c", ""], check=True)


def test_a_moved_environment_is_said_by_set_up_and_doctor_and_left_alone(made, copied):
    assert former_folder(made) is None and former_folder(copied) == made
    before = sorted(copied.rglob("*"))
    with pytest.raises(UserError, match=f"was moved, and its programs start the Python of {made};"):
        Setup(copied).run()
    code = "from horovod_lm.setup import doctor; print(list(doctor.check_python()))"
    command = [copied / "bin" / "python", "-B", "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert f"moved: its programs start the Python of {made}" in done.stdout, done.stderr
    assert sorted(copied.rglob("*")) == before


DOWNLOAD = """
import sys
from horovod_lm.setup import environment
from horovod_lm.utils.cli import run_cli

code = "import tempfile, time; file = tempfile.NamedTemporaryFile(); time.sleep(600)"

class Download(environment.Setup):
    def run(self):
        with self.hold():
            self.step("a download", [sys.executable, "-c", code])

environment.Setup = Download
run_cli(environment.main, ["--venv", sys.argv[1]])
"""


def test_an_interrupted_step_leaves_no_temporary_files(tmp_path):
    setup = Setup(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(setup.temporary.glob("*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "stopped.\n"
    assert process.returncode == 130
    assert not setup.temporary.exists()


def test_the_pins_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML parser")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins, project = read_pins(ROOT / "pyproject.toml"), pyproject["project"]
    assert pins["torch"] == pyproject["tool"]["horovod-lm"]["torch"]
    assert f"torch>={pins['oldest_torch']}" in project["dependencies"]
    assert f">={pins['oldest_python']}" == project["requires-python"] == f">=3.{OLDEST}"
    assert numbers(pins["torch"] + "+cpu") >= numbers(pins["oldest_torch"]) > numbers("2.5.1")
    assert set(environment.EXTRAS.split(",")) <= set(project["optional-dependencies"])


@pytest.fixture
def index(tmp_path) -> Iterator[str]:
    """A package index with the pinned torch, empty but for its version."""
    version = read_pins(ROOT / "pyproject.toml")["torch"]
    folder, info = tmp_path / "index" / "torch", f"torch-{version}.dist-info"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_torch_comes_from_the_index_that_is_named(copied, monkeypatch, index):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/empty")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_INDEX_URL", index)
    setup = Setup(copied)
    with setup.hold():
        setup.install_torch(find_environment(copied))
    assert find_environment(copied).torch == setup.pins["torch"]


NOWHERE = "http://127.0.0.1:9/cpu"
REMARK = (
    f"{NOWHERE} does not answer: torch comes from pip's own index, at most 2.7 GB to download (CUDA"
    " build); for another index: make setup TORCH_INDEX_URL=..."
)


@pytest.mark.parametrize(
    ("driver", "url", "options", "kind", "remark"),
    [
        (True, "", [], "CUDA", ""),
        (False, "", [], "CUDA", REMARK),
        (True, "cpu", ["--no-deps", "--extra-index-url", "{}/cpu"], "CPU", ""),
        (False, "cu126", ["--no-deps", "--extra-index-url", "{}/cu126"], "CUDA", ""),
    ],
)
def test_the_build_of_torch_follows_the_driver(
    monkeypatch, tmp_path, index, driver, url, options, kind, remark
):
    for name in ("cpu", "cu126"):
        (tmp_path / "index" / name / "torch").mkdir(parents=True)
    monkeypatch.setattr(environment, "CPU_INDEX", NOWHERE)
    monkeypatch.setattr(environment, "has_gpu_driver", lambda: driver)
    monkeypatch.setenv("TORCH_INDEX_URL", f"{index}/{url}" if url else "")
    expected = [option.format(index) for option in options]
    assert torch_source() == (expected, kind, remark)


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Setup:
    """The set-up of a folder that looks like an environment in which every step was done."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / PATCHES, project / PATCHES)
    shutil.copy(ROOT / "pyproject.toml", project)
    monkeypatch.setattr(environment, "ROOT", project)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    packages = tmp_path / f"lib/python3.{sys.version_info[1]}/site-packages"
    for package in ("horovod_lm-0.1.0", "horovod-0.28.1+lm.0123456789ab", "torch-2.13.0"):
        (packages / f"{package}.dist-info").mkdir(parents=True)
    setup = Setup(tmp_path)
    setup.stamp.write_text(setup.digest())
    return setup


def relink_python(setup: Setup) -> None:
    (setup.folder / "bin" / "python").unlink()
    (setup.folder / "bin" / "python").symlink_to("/bin/sh")


CHANGES: dict[str, Callable[[Setup], object]] = {
    "other options": lambda setup: setup.horovod_options.append("--no-nccl"),
    "another Python": relink_python,
    "no Horovod": lambda setup: next(setup.folder.glob("lib/*/*/horovod-*")).rmdir(),
    "no Python": lambda setup: (setup.folder / "bin" / "python").unlink(),
    "not completed": lambda setup: setup.stamp.write_text("012345"),
    "a new patch": lambda setup: (setup.folder / "project" / PATCHES / "26-new.patch").touch(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_steps_run_again_after_a_change_only(finished, capsys, change):
    Setup(finished.folder).run()
    assert capsys.readouterr().out.endswith("is ready: nothing to do.\n")
    CHANGES[change](finished)
    assert not finished.is_ready()


def test_a_step_that_fails_shows_its_last_lines_and_its_log(made, capsys):
    setup = Setup(made)
    code = "print(*range(30), sep='\\n'); raise SystemExit(1)"
    with setup.hold(), pytest.raises(UserError, match="numbers could not be installed") as error:
        setup.step("numbers", [sys.executable, "-c", code])
    assert "  | 29\n" in str(error.value) and "  | 9\n" not in str(error.value)
    assert str(setup.log) in str(error.value)
    assert "\n9\n" in setup.log.read_text()
    assert re.fullmatch(r"  numbers ...\n  numbers: failed after \d+ s\n", capsys.readouterr().out)


def test_the_lines_that_activate_work_when_they_are_pasted(made):
    assert "    source .venv/bin/activate\n" in next_steps(ROOT / ".venv")
    cd, activate = (line.strip() for line in next_steps(made).splitlines()[1:3])
    script = f"{cd}\n{activate}\necho $PWD\ncommand -v python\n"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [str(ROOT), str(made / "bin" / "python")]
