"""From a fresh machine to a ready environment: what `make setup` does.

Requirements that are missing are reported before anything is downloaded. The steps:

    1. the environment     a virtual environment, or the one that was named
    2. torch               with CUDA where NVIDIA's driver is installed, else for CPUs
    3. the project         this package in editable form, with its dependencies
    4. Horovod             built for that torch (python -m horovod_lm.setup.install_horovod)

After a failed step run it again; what is installed stays. TORCH_INDEX_URL names a package index
with another build of torch (default without a driver: https://download.pytorch.org/whl/cpu).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from horovod_lm.setup.cuda import numbers
from horovod_lm.setup.install_horovod import cache_folder, user_cache
from horovod_lm.setup.steps import call, interrupt_on_termination, lock, pip_command, run_step
from horovod_lm.setup.toolchain import missing_for_build
from horovod_lm.utils.cli import shown
from horovod_lm.utils.errors import UserError, last_line
from horovod_lm.utils.machine import has_gpu_driver
from horovod_lm.utils.progress import format_seconds

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "notebooks,test"
ANOTHER_FOLDER = "choose another folder: make setup VENV=..."
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Bytes in the environment, and bytes that pip downloads; pip keeps a whole download in its
# temporary folder while it installs, and a copy in its cache. Measured with torch 2.13.0.
BYTES_FOR_TORCH = {"CPU": (0.9e9, 0.2e9), "CUDA": (4.8e9, 2.7e9)}
BYTES_FOR_PROJECT = (1.1e9, 0.3e9)
BYTES_FOR_BUILD = 0.5e9  # Horovod's build folder grows to 0.2 GB

# Run by the Python of an existing environment. pip writes INSTALLER last, when a package is
# complete. MARK separates the answer from anything else that this Python prints when it starts.
MARK = "horovod_lm describes this environment: "
DESCRIBE = f"""
import importlib.util, json, sys, sysconfig
try:
    from importlib.metadata import distribution
    torch = distribution("torch")
    torch = torch.version if torch.read_text("INSTALLER") else None
except Exception:
    torch = None
has_pip = importlib.util.find_spec("pip") is not None
print({MARK!r} + json.dumps([sys.version_info[:3], sysconfig.get_path("include"), has_pip, torch]))
"""


class Environment(NamedTuple):
    """A Python environment that exists."""

    python: Path  # its interpreter
    version: tuple[int, ...]  # of Python
    include: Path  # the folder for Python's headers
    has_pip: bool
    torch: str | None  # its version; None: torch is not installed


class TorchSource(NamedTuple):
    """Where pip gets torch from."""

    options: list[str]  # of `pip install`; only torch comes from the index that they name
    kind: str  # "CPU" or "CUDA", the largest build that is to be expected there
    remark: str = ""  # a sentence for the user if the index does not answer


class Setup:
    """One run of set-up, in the folder of an environment; the options are `install_horovod`'s."""

    def __init__(self, folder: Path, horovod_options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.horovod_options = list(horovod_options)
        self.pins = read_pins(ROOT / "pyproject.toml")
        self.log = folder / "horovod_lm-setup.log"  # locked while a set-up works in the folder
        self.temporary = folder / "horovod_lm-setup.tmp"  # always removed at the end
        self.stamp = folder / "horovod_lm-setup.done"  # `digest()` of the last complete set-up
        self.variables = os.environ | {"TMPDIR": str(self.temporary)}  # of the steps

    def run(self) -> None:
        """Run all steps, unless nothing has changed since they were completed."""
        if self.is_ready():
            print(f"{shown(self.folder)} is ready: nothing to do.")
            return
        started = time.monotonic()
        if missing := self.missing():
            raise UserError("\n- ".join(["before the set-up can start:", *missing]))
        with self.hold():
            print(f"setting up {self.folder}; log: {self.log}", flush=True)
            environment = find_environment(self.folder) or self.make_environment()
            python = str(environment.python)
            if not environment.has_pip:
                self.step("pip", [python, "-m", "ensurepip", "--upgrade"])
            if self.lacks_torch(environment):
                self.install_torch(environment)
            project = f"{ROOT}[{EXTRAS}]"
            self.step("the project", pip_command("install", "-e", project, python=python))
            command = [python, "-m", "horovod_lm.setup.install_horovod", *self.horovod_options]
            if call(command, cwd=ROOT, env=self.variables):
                raise UserError("Horovod is not installed, for the reason above")
            self.stamp.write_text(self.digest())
        elapsed = format_seconds(time.monotonic() - started)
        print(f"{shown(self.folder)} is ready, after {elapsed}.")

    def missing(self) -> list[str]:
        """Return what set-up lacks on this machine, one sentence each; nothing is changed."""
        environment, missing = find_environment(self.folder), []
        if environment is None:
            if os.path.lexists(self.folder) and not self.may_be_made():
                missing.append(
                    f"{self.folder} has files but no Python environment, so it stays as it is;"
                    f" {ANOTHER_FOLDER}"
                )
            if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
                missing.append(
                    f"{sys.executable} cannot create environments; on Debian or Ubuntu: "
                    f"apt-get install python3.{sys.version_info[1]}-venv"
                )
        elif environment.version[:2] < numbers(self.pins["oldest_python"]):
            found = ".".join(map(str, environment.version))
            missing.append(
                f"{environment.python} is Python {found}, and {self.pins['oldest_python']} or newer"
                " is needed"
            )
        if moved_from := former_folder(self.folder):
            missing.append(
                f"{self.folder} was moved, and its programs start the Python of {moved_from};"
                f" delete it and run this again (pip's cache has most files), or {ANOTHER_FOLDER}"
            )
        missing += missing_for_build(environment.include if environment else None)
        for folder, name in ((self.folder, "VENV"), (cache_folder(), "HOROVOD_LM_CACHE")):
            if not os.access(existing(folder), os.W_OK | os.X_OK) or existing(folder).is_file():
                missing.append(
                    f"{folder} cannot be written; choose another folder: make setup {name}=..."
                )
        return missing + self.missing_space(environment)

    def missing_space(self, environment: Environment | None) -> list[str]:
        """Return a sentence for each disk that is too full for what is not installed yet."""
        installed, downloaded = BYTES_FOR_PROJECT
        if self.lacks_torch(environment):
            of_torch = BYTES_FOR_TORCH[torch_source().kind]
            installed, downloaded = installed + of_torch[0], downloaded + of_torch[1]
        elif self.installed("horovod_lm-*"):
            installed = downloaded = 0.0
        pip_cache = Path(os.environ.get("PIP_CACHE_DIR") or user_cache() / "pip").expanduser()
        # The environment's folder also holds the temporary files.
        wanted = {self.folder: installed + downloaded, pip_cache: downloaded}
        disks: dict[int, tuple[Path, float]] = {}
        for path, size in [*wanted.items(), (cache_folder(), BYTES_FOR_BUILD)]:
            disk = existing(path).stat().st_dev
            place, needed = disks.get(disk, (existing(path), 0.0))
            disks[disk] = place, needed + size
        return [
            f"{needed / 1e9:.1f} GB are needed on the disk of {place}, and {free / 1e9:.1f} GB are"
            " free; delete files there, or choose folders on another disk: make setup VENV=..."
            " HOROVOD_LM_CACHE=... PIP_CACHE_DIR=..."
            for place, needed in disks.values()
            if (free := shutil.disk_usage(place).free) < needed
        ]

    def lacks_torch(self, environment: Environment | None) -> bool:
        """Return whether torch is not installed, or too old."""
        torch = environment.torch if environment else None
        return torch is None or numbers(torch) < numbers(self.pins["oldest_torch"])

    def may_be_made(self) -> bool:
        """Return whether the folder is empty or an environment whose Python is gone."""
        if (self.folder / "pyvenv.cfg").is_file():
            return True
        return self.folder.is_dir() and all(path == self.log for path in self.folder.iterdir())

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder; provide an empty temporary folder in it, always removed at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.log, f"another set-up in {self.folder}"):
            self.log.write_text("")
            shutil.rmtree(self.temporary, ignore_errors=True)  # of a set-up that was killed
            self.temporary.mkdir()
            try:
                yield
            finally:
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # takes a second at most
                shutil.rmtree(self.temporary, ignore_errors=True)
                signal.signal(signal.SIGINT, handler)

    def make_environment(self) -> Environment:
        """Create a virtual environment; the folder's other files stay."""
        for link in self.folder.glob("bin/python*"):
            if not link.exists():  # of a Python that is gone; venv would leave it
                link.unlink()
        self.step("the environment", [sys.executable, "-m", "venv", str(self.folder)])
        environment = find_environment(self.folder)
        assert environment is not None, f"{sys.executable} -m venv made no Python"
        return environment

    def install_torch(self, environment: Environment) -> None:
        """Install the pinned torch, with CUDA where NVIDIA's driver is installed."""
        source = torch_source()
        if source.remark:
            print(f"  {source.remark}")
        torch = f"torch=={self.pins['torch']}"
        command = pip_command("install", *source.options, torch, python=environment.python)
        self.step(f"torch {self.pins['torch']}", command)

    def step(self, title: str, command: list[str]) -> None:
        """Run a command, with its output in the log, whose last lines explain a failure."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
        if not run_step(title, command, self.log, cwd=ROOT, env=self.variables):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = "\n".join(f"  | {line}" for line in lines[-8:])
            raise UserError(
                f"{title} could not be installed; the last output:\n{last}\n"
                f"The full log: {self.log}\n"
                "Fix the cause and run this again: what is installed stays."
            )

    def is_ready(self) -> bool:
        """Return whether set-up was completed with its present inputs, and nothing is missing."""
        try:
            is_complete = self.stamp.read_text() == self.digest()
        except (OSError, ValueError):
            return False
        packages = ("horovod_lm-*", "horovod-*+lm.*", "torch-*")
        exist = all(map(self.installed, packages)) and (self.folder / "bin" / "python").exists()
        return is_complete and exist and former_folder(self.folder) is None

    def installed(self, pattern: str) -> list[str]:
        """Return the names and versions of installed packages, as their folders are called."""
        packages = self.folder.glob(f"lib/python3.*/site-packages/{pattern}.dist-info")
        return sorted(package.name for package in packages)

    def digest(self) -> str:
        """Return a hash of everything that the environment depends on."""
        files = [ROOT / "pyproject.toml", *(ROOT / "horovod_lm/setup/patches").glob("*.patch")]
        inputs = [EXTRAS, str(ROOT), *self.installed("torch-*"), *self.horovod_options]
        inputs += [file.read_text(encoding="utf-8") for file in sorted(files)]
        python = os.path.realpath(self.folder / "bin" / "python")
        return hashlib.sha256("\0".join([python, *inputs]).encode()).hexdigest()


def torch_source() -> TorchSource:
    """Choose the index of torch by the driver; TORCH_INDEX_URL may name another one."""
    kind = "CUDA" if sys.platform == "linux" else "CPU"  # of pip's own index
    default = "" if has_gpu_driver() or kind == "CPU" else CPU_INDEX
    index = os.environ.get("TORCH_INDEX_URL") or default
    if not index:
        return TorchSource([], kind)
    try:
        urlopen(f"{index.rstrip('/')}/torch/", timeout=5).close()
    except (OSError, ValueError):
        gigabytes = BYTES_FOR_TORCH[kind][1] / 1e9
        remark = (
            f"{index} does not answer: torch comes from pip's own index, at most {gigabytes:.1f} GB"
            f" to download ({kind} build); for another index: make setup TORCH_INDEX_URL=..."
        )
        return TorchSource([], kind, remark)
    # Without dependencies: those are installed with the project.
    kind = "CPU" if index.rstrip("/").endswith("cpu") else kind
    return TorchSource(["--no-deps", "--extra-index-url", index], kind)


def find_environment(folder: Path) -> Environment | None:
    """Return the environment in `folder`, or None if there is no Python in it.

    Raises:
        UserError: its Python does not run; it may run later, so nothing is changed.
    """
    python = folder / "bin" / "python"
    try:
        done = subprocess.run(
            [str(python), "-c", DESCRIBE], capture_output=True, text=True, errors="replace"
        )
        printed, output = done.stdout, done.stderr or done.stdout
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        printed, output = "", str(error.strerror)
    if MARK not in printed:
        raise UserError(
            f"{python} does not run ({last_line(output)}), and nothing was changed; repair it, or "
            f"{ANOTHER_FOLDER}"
        )
    answer = printed.split(MARK, 1)[1].splitlines()[0]
    version, include, has_pip, torch = json.loads(answer)
    return Environment(python, tuple(version), Path(include), has_pip, torch)


def former_folder(folder: Path) -> Path | None:
    """Return where an environment was created, if it was moved or copied since; else None."""
    for script in folder.glob("bin/pip*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = re.search(r"""(/.*)/bin/python[\d.]*["\s]""", script.read_text("utf-8")[:1000])
            if found and not (os.path.exists(found[1]) and os.path.samefile(found[1], folder)):
                return Path(found[1])
    return None


def read_pins(pyproject: Path) -> dict[str, str]:
    """Return the versions that set-up needs: torch's, and the oldest of torch and of Python.

    They are found by the form of their lines, because Python 3.10 has no TOML parser.
    """
    text = pyproject.read_text(encoding="utf-8")
    patterns = {
        "torch": r'^torch = "([^"]+)"',
        "oldest_torch": r'^\s*"torch>=([^"]+)"',
        "oldest_python": r'^requires-python = ">=([^"]+)"',
    }
    return {name: re.findall(pattern, text, re.MULTILINE)[0] for name, pattern in patterns.items()}


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def make_command(target: str, folder: Path) -> str:
    """Return the call of make that uses an environment, for a message."""
    if folder.absolute() == ROOT / ".venv":
        return f"make {target}"
    return f"make {target} VENV={shlex.quote(str(folder))}"


def next_steps(folder: Path) -> str:
    """Return the commands that use an environment: lines to paste, in any folder."""
    script = folder / "bin" / "activate"
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    activate = ["source", str(script)]
    if (folder / "conda-meta").is_dir():
        activate = ["conda", "activate", str(folder)]
    return f"""To train in a terminal:
    {shlex.join(["cd", str(ROOT)])}
    {shlex.join(activate)}
    horovodrun -np 2 python -m horovod_lm.train --config configs/tiny.yaml
To open the course in JupyterLab: {make_command("lab", folder)}"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="make setup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    use = "the environment to create or to use; an active one: $VIRTUAL_ENV or $CONDA_PREFIX"
    add("--venv", type=Path, default=ROOT / ".venv", help=use)
    build_help = "for horovod_lm.setup.install_horovod, for example '--no-nccl'"
    add("--horovod-options", default="", metavar="OPTIONS", help=build_help)
    add("--next", action="store_true", help="print how to use the environment")
    arguments = parser.parse_args(argv)
    folder = arguments.venv.absolute()
    interrupt_on_termination()
    Setup(folder, shlex.split(arguments.horovod_options)).run()
    if arguments.next:
        print(next_steps(folder))
    return 0
