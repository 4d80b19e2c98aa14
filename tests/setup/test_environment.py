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
from contextlib import contextmanager
from pathlib import Path

import pytest

from horovod_lm.setup import environment, torch_build
from horovod_lm.setup.cuda import numbers
from horovod_lm.setup.environment import (
    MARK,
    Environment,
    Setup,
    find_environment,
    former_folder,
    next_steps,
    read_pins,
)
from horovod_lm.utils.errors import UserError
from tests.conftest import ROOT

BOOTSTRAP = ROOT / "horovod_lm" / "setup" / "bootstrap.py"
UNDER_PYTHON_3_8 = """
import runpy, sys
sys.version_info = (3, 8, 18)
runpy.run_path({path!r}, run_name="__main__")
"""


def program(path: Path, body: str) -> Path:
    """Write a shell script in place of a tool."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real environment, as set-up creates it, in a path with a space."""
    setup = Setup(tmp_path_factory.mktemp("a b") / "env")
    with setup.hold():
        found = setup.make_environment()
    assert found.has_pip and found.torch is None and not setup.temporary.exists()
    assert setup.stamps() == {"made_here": True}
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


@pytest.mark.parametrize(("options", "said"), [([], "TORCH_INDEX_URL"), (["doctor"], "--hosts")])
def test_help_needs_nothing_that_is_not_installed_yet(options, said):
    # -I -S: no site-packages at all, as on a fresh machine.
    command = [sys.executable, "-I", "-S", str(BOOTSTRAP), *options, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout, done.stderr


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
        ("thesis.txt", "", "env has no bin/python and was not made by this set-up, so it stays"),
        (".", "", "env has no bin/python and was not made by this set-up, so it stays"),
        ("bin/python", "echo out of luck >&2; exit 1", r"not run \(out of luck\), and nothing was"),
        (
            "bin/python",
            f"echo 'good morning'; echo '{MARK}[[3, 8, 1], \"/\", true, null]'; echo bye",
            r"python is Python 3\.8\.1, and 3\.10 or newer is needed",
        ),
    ],
)
def test_what_the_set_up_did_not_make_is_left_alone(tmp_path, file, body, said):
    folder = tmp_path / "env"
    if file != ".":
        folder.mkdir()
    program(folder / file, body)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        Setup(folder).run()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_environment_of_these_tests_is_found():
    import torch

    found = find_environment(Path(sys.prefix))
    # The metadata of PyPI's CUDA build lack the local version of torch.__version__.
    public = [version.split("+")[0] for version in (found.torch, torch.__version__)]
    assert found.version == sys.version_info[:3] and public[0] == public[1]


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


@contextmanager
def served(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on this machine; yield the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        server.handle_error = lambda *arguments: None  # pip hangs up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class SlowIndex(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel, whose download does not end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        page = b'<a href="/huge-1.0-py3-none-any.whl">huge-1.0-py3-none-any.whl</a>'
        self.send_response(200)
        is_wheel = self.path.endswith(".whl")
        self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
        self.send_header("Content-Length", str(10**9 if is_wheel else len(page)))
        self.end_headers()
        self.wfile.write(page)
        while is_wheel:
            self.wfile.write(bytes(100_000))
            time.sleep(0.05)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


INSTALL_HUGE = """
import sys
from horovod_lm.setup import environment
from horovod_lm.setup.steps import pip_command
from horovod_lm.utils.cli import run_cli

class Installation(environment.Setup):
    def run(self):
        with self.hold():
            python = self.folder / "bin" / "python"
            options = ["install", "--index-url", sys.argv[2], "huge"]
            self.step("huge", pip_command(*options, python=python))

environment.Setup = Installation
run_cli(environment.main, ["--venv", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_leaves_nothing(made, number):
    setup = Setup(made)
    with served(SlowIndex) as index:
        process = subprocess.Popen(
            [sys.executable, "-c", INSTALL_HUGE, str(made), index],
            env=os.environ | {"PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        downloads = functools.partial(setup.temporary.glob, "pip-unpack-*/*.whl")
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 10**6 for path in downloads()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == "stopped.\n"
    assert process.returncode == 130
    assert "Operation cancelled by user" in setup.log.read_text()  # pip cleaned up
    assert not setup.temporary.exists()


def test_the_pins_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML parser")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins, project = read_pins(ROOT / "pyproject.toml"), pyproject["project"]
    assert pins["torch"] == pyproject["tool"]["horovod-lm"]["torch"]
    assert f"torch>={pins['oldest_torch']}" in project["dependencies"]
    assert f">={pins['oldest_python']}" == project["requires-python"]
    assert numbers(pins["torch"]) >= numbers(pins["oldest_torch"])
    assert set(environment.EXTRAS.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("version", "lacks"),
    [("2.13.0+cpu", False), ("2.6.0", False), ("2.5.1", True), ("3.0.0a1", False), (None, True)],
)
def test_versions_are_compared_by_number(tmp_path, version, lacks):
    found = Environment(tmp_path, (3, 11, 2), tmp_path, True, version)
    assert Setup(tmp_path).lacks_torch(found) is lacks


@pytest.fixture
def index(tmp_path, monkeypatch) -> Iterator[Callable[[str], None]]:
    """A package index, the only one that pip asks; call it to add a torch of some version."""
    folder = tmp_path / "index" / "torch"
    folder.mkdir(parents=True)

    def add(version: str) -> None:
        name, info = f"torch-{version}-py3-none-any.whl", f"torch-{version}.dist-info"
        with zipfile.ZipFile(folder / name, "w") as wheel:
            metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder.parent)
    with served(handler) as address:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", address)
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        yield add


@pytest.mark.parametrize(
    ("driver", "builds", "url", "taken", "said"),
    [
        (False, ["2.13.0", "2.13.0+cpu"], "here", "2.13.0+cpu", "CPU build, 0.2 GB to download"),
        (True, ["2.13.0"], "", "2.13.0", "torch 2.13.0, CUDA build, 2.7 GB to download"),
        (True, ["2.13.0+cpu"], "", "2.13.0+cpu", "driver is installed, but pip's index has only"),
        (
            False,
            ["2.13.0"],
            "http://127.0.0.1:9/",
            "2.13.0",
            "http://127.0.0.1:9/ does not answer, and pip's own index has torch 2.13.0, CUDA build,"
            " 2.7 GB to download; for another index: make setup TORCH_INDEX_URL=...",
        ),
    ],
)
def test_the_build_of_torch_follows_the_driver(
    copied, monkeypatch, capsys, index, driver, builds, url, taken, said
):
    for build in builds:
        index(build)
    monkeypatch.setattr(torch_build, "has_gpu_driver", lambda: driver)
    monkeypatch.setenv("TORCH_INDEX_URL", os.environ["PIP_INDEX_URL"] if url == "here" else url)
    setup = Setup(copied)
    with setup.hold():
        setup.install_torch(find_environment(copied))
    assert find_environment(copied).torch == taken
    assert said in capsys.readouterr().out


@pytest.fixture
def finished(tmp_path) -> Setup:
    """The set-up of a folder that looks like an environment in which every step was done."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    lib = f"python3.{sys.version_info[1]}"
    for package in ("horovod_lm-0.1.0", "horovod-0.28.1+lm.0123456789ab", "torch-2.13.0"):
        (tmp_path / "lib" / lib / "site-packages" / f"{package}.dist-info").mkdir(parents=True)
    setup = Setup(tmp_path)
    setup.stamp(project=setup.digest("project"), horovod=setup.digest("horovod"))
    return setup


CHANGES: dict[str, Callable[[Setup], object]] = {
    "other options": lambda setup: setup.horovod_options.append("--mpi"),
    "another torch": lambda setup: next(setup.folder.glob("lib/*/*/torch-*")).rename(
        setup.folder / f"lib/python3.{sys.version_info[1]}/site-packages/torch-2.14.0.dist-info"
    ),
    "no Horovod": lambda setup: next(setup.folder.glob("lib/*/*/horovod-*")).rmdir(),
    "no Python": lambda setup: (setup.folder / "bin" / "python").unlink(),
    "stamps cut short": lambda setup: setup.stamps_path.write_text('{"horovod": "01'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_horovod_is_looked_at_again_after_a_change_only(finished, capsys, change):
    Setup(finished.folder).run()
    assert capsys.readouterr().out.endswith("is ready: nothing to do.\n")
    CHANGES[change](finished)
    assert not finished.is_done("horovod")


def test_a_changed_pyproject_installs_the_project_again(finished, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("root")
    (elsewhere / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n# more\n")
    monkeypatch.setattr(environment, "ROOT", elsewhere)
    assert not finished.is_done("project")


def test_a_step_that_fails_shows_its_last_lines_and_its_log(made):
    setup = Setup(made)
    code = "print(*range(30), sep='\\n'); raise SystemExit(1)"
    with setup.hold(), pytest.raises(UserError, match="numbers could not be installed") as error:
        setup.step("numbers", [sys.executable, "-c", code])
    assert "  | 29\n" in str(error.value) and "  | 9\n" not in str(error.value)
    assert str(setup.log) in str(error.value)
    assert "\n9\n" in setup.log.read_text()


def test_the_lines_that_activate_work_when_they_are_pasted(made):
    assert "    source .venv/bin/activate\n" in next_steps(ROOT / ".venv")
    cd, activate = (line.strip() for line in next_steps(made).splitlines()[1:3])
    script = f"{cd}\n{activate}\necho $PWD\ncommand -v python\n"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [str(ROOT), str(made / "bin" / "python")]
