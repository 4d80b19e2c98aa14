"""From a fresh machine to a ready environment: what `make setup` does.

What is missing is said before anything is downloaded. The steps, skipped where done before:

    1. the environment     a virtual environment, or the one that was named
    2. torch               with CUDA where NVIDIA's driver is installed, else for CPUs
    3. the project         this package in editable form, with what it depends on
    4. Horovod             built for that torch (python -m horovod_lm.setup.install_horovod)

A step that fails can be run again; finished steps stay. TORCH_INDEX_URL names a package index with
another build of torch (default without a driver: https://download.pytorch.org/whl/cpu).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.request import urlopen

from horovod_lm.setup import preflight
from horovod_lm.setup.install_horovod import cache_folder
from horovod_lm.utils.cli import shown
from horovod_lm.utils.errors import UserError
from horovod_lm.utils.machine import has_gpu_driver

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "notebooks,test"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS_FOR_INDEX = 5
SECONDS_TO_STOP = 60

# Measured with torch 2.13.0: bytes in the environment, and bytes that pip downloads. pip keeps a
# whole download in its temporary folder while it installs, and a copy in its cache.
BYTES_FOR_TORCH = {"CPU": (0.9e9, 0.2e9), "CUDA": (4.8e9, 2.7e9)}
BYTES_FOR_PROJECT = (1.1e9, 0.3e9)
BYTES_FOR_BUILD = 0.5e9  # Horovod's build folder grows to 0.2 GB

# Asked of an environment that exists, whichever Python it has. pip writes INSTALLER when all files
# of a package are there. Whatever else the Python prints at its start, the answer is marked.
MARK = "horovod_lm describes this environment: "
DESCRIBE = f"""
import json, sys, sysconfig
try:
    from importlib.metadata import distribution
    torch = distribution("torch")
    torch = torch.version if torch.read_text("INSTALLER") else None
except Exception:
    torch = None
try:
    import pip
except ImportError:
    pip = None
include = sysconfig.get_path("include")
print({MARK!r} + json.dumps([sys.version_info[:3], include, bool(pip), torch]))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment that exists: where it is, and what is in it."""

    folder: Path
    version: tuple[int, ...]
    include: Path  # where Python's headers should be
    has_pip: bool
    torch: str | None  # its version, if it is installed

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.folder / "bin" / "python"

    def pip(self, *arguments: str) -> list[str]:
        """Return a call of the environment's own pip."""
        options = ["--disable-pip-version-check", "--no-input"]
        return [str(self.python), "-m", "pip", *options, *arguments]


class Setup:
    """One run of the set-up.

    Attributes:
        folder: the environment.
        log: what the steps print; locked while a set-up works in the folder.
        temporary: the temporary files of pip and the build; removed at the end in any case.
        stamps_path: which steps are finished, and whether the set-up made the environment.
    """

    def __init__(self, folder: Path, horovod_options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.horovod_options = list(horovod_options)
        self.pins = read_pins(ROOT / "pyproject.toml")
        self.log = folder / "horovod_lm-setup.log"
        self.temporary = folder / "horovod_lm-setup.tmp"
        self.stamps_path = folder / "horovod_lm-setup.json"

    def run(self) -> None:
        """Run all steps, each skipped if it was done before.

        Raises:
            UserError: something is missing, or a step failed.
        """
        moved_from = former_folder(self.folder)
        if not moved_from and self.is_done("project") and self.is_done("horovod"):
            print(f"{shown(self.folder)} is ready: nothing to do.")
            return
        started = time.monotonic()
        environment, missing = self.look()
        if missing:
            raise UserError("\n- ".join(["before the set-up can start:", *missing]))
        with self.hold():
            print(f"setting up {self.folder}; log: {self.log}", flush=True)
            environment = environment or self.make_environment()
            if moved_from:
                self.mend_moved(environment, moved_from)
            if not environment.has_pip:
                self.step("pip", [str(environment.python), "-m", "ensurepip", "--upgrade"])
            if self.lacks_torch(environment):
                self.install_torch(environment)
            if not self.is_done("project"):
                # After a move nothing is missing, and without isolation nothing is downloaded.
                options = ["--no-build-isolation"] if moved_from else []
                command = environment.pip("install", *options, "-e", f"{ROOT}[{EXTRAS}]")
                self.step("the project and what it needs", command)
                self.stamp(project=self.digest("project"))
            if not self.is_done("horovod"):
                command = [str(environment.python), "-m", "horovod_lm.setup.install_horovod"]
                if self.call([*command, *self.horovod_options]) != 0:
                    raise UserError("Horovod is not installed, for the reason above")
                self.stamp(horovod=self.digest("horovod"))
        print(f"{shown(self.folder)} is ready, after {elapsed(started)}.")

    def look(self) -> tuple[Environment | None, list[str]]:
        """Look at the folder and at the machine, and change nothing.

        Returns:
            The environment, None if it must be made, and what is missing, one sentence each.

        Raises:
            UserError: the folder holds what the set-up did not make and cannot use.
        """
        environment = find_environment(self.folder)
        if environment is None:
            self.check_folder()
            missing = preflight.missing_modules()
            include = Path(sysconfig.get_path("include"))
        else:
            missing = self.missing_version(environment)
            include = environment.include
        moved_from = former_folder(self.folder)
        if moved_from and not self.is_made_here():
            missing.append(
                f"the programs in {self.folder} start the Python of {moved_from}, where it was made"
                " by another tool; make it again at its new place, or choose another folder: "
                "make setup VENV=..."
            )
        missing += preflight.missing_headers(include) + preflight.missing_for_compiling()
        missing += preflight.missing_rights(self.folder, "make setup VENV=...")
        missing += preflight.missing_rights(cache_folder(), "make setup HOROVOD_LM_CACHE=...")
        return environment, missing + self.missing_space(environment, "CPU")

    def check_folder(self) -> None:
        """Refuse a folder without a Python, unless it is empty or the set-up made it.

        Raises:
            UserError: it holds something else, which stays as it is.
        """
        if (self.folder / "conda-meta").is_dir():
            install = shlex.join(
                ["conda", "install", "--prefix", str(self.folder), "python", "pip"]
            )
            raise UserError(
                f"{self.folder} is a conda environment without Python; first: {install}"
            )
        holds_something = not self.folder.is_dir() or not is_empty(self.folder)
        if os.path.lexists(self.folder) and holds_something and not self.is_made_here():
            raise UserError(
                f"{self.folder} has no bin/python and was not made by this set-up, so it stays as "
                "it is; choose another folder: make setup VENV=..."
            )

    def missing_version(self, environment: Environment) -> list[str]:
        """Return a sentence if the environment's Python is too old."""
        oldest = self.pins["oldest_python"]
        if environment.version[:2] >= numbers(oldest):
            return []
        found = ".".join(map(str, environment.version))
        return [f"{environment.python} is Python {found}, and {oldest} or newer is needed"]

    def missing_space(self, environment: Environment | None, kind: str) -> list[str]:
        """Return a sentence for each disk that is too full for what is left to do.

        Args:
            environment: None if it must be made.
            kind: of torch, "CPU" or "CUDA".
        """
        installed, downloaded = BYTES_FOR_PROJECT
        if self.lacks_torch(environment):
            installed += BYTES_FOR_TORCH[kind][0]
            downloaded += BYTES_FOR_TORCH[kind][1]
        elif self.is_done("project"):
            installed = downloaded = 0.0
        return preflight.missing_space(
            [
                ("the environment", self.folder, installed),
                ("temporary files", self.folder, downloaded),
                ("pip's cache", pip_cache(), downloaded),
                ("Horovod's build", cache_folder(), BYTES_FOR_BUILD),
            ]
        )

    def lacks_torch(self, environment: Environment | None) -> bool:
        """Whether torch is not installed, or too old."""
        found = environment.torch if environment else None
        return found is None or numbers(found) < numbers(self.pins["oldest_torch"])

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder and have an empty temporary folder in it, removed in any case.

        Raises:
            UserError: another set-up works there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_empty(self.folder):
            self.stamp(made_here=True)
        with self.log.open("a", encoding="utf-8") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another set-up is at work in {self.folder}; wait for its end"
                ) from None
            log.truncate(0)
            shutil.rmtree(self.temporary, ignore_errors=True)  # of one that was killed
            self.temporary.mkdir()
            try:
                yield
            finally:
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # takes a second at most
                shutil.rmtree(self.temporary, ignore_errors=True)
                signal.signal(signal.SIGINT, handler)

    def make_environment(self) -> Environment:
        """Step 1: a virtual environment. What the folder holds already is never cleared."""
        for link in self.folder.glob("bin/python*"):
            if not link.exists():  # of a Python that is gone; venv would leave it
                link.unlink()
        self.stamps_path.write_text(json.dumps({"made_here": True}) + "\n")
        self.step("the environment", [sys.executable, "-m", "venv", str(self.folder)])
        environment = find_environment(self.folder)
        if environment is None:
            raise UserError(f"{sys.executable} -m venv made no Python in {self.folder}")
        return environment

    def mend_moved(self, environment: Environment, moved_from: Path) -> None:
        """Make the scripts of an environment that was moved or copied start its own Python."""
        print(f"  moved from {moved_from}: its programs now start the Python that is here")
        rewrite_scripts(self.folder, moved_from)
        # venv writes bin/activate* and pyvenv.cfg anew and leaves the packages.
        command = [str(environment.python), "-m", "venv", "--without-pip", str(self.folder)]
        self.step("the environment", command)

    def install_torch(self, environment: Environment) -> None:
        """Step 2: the pinned torch, with CUDA where NVIDIA's driver is installed.

        Raises:
            UserError: there is no room for it, or it cannot be installed.
        """
        wanted = f"torch=={self.pins['torch']}"
        default = "" if has_gpu_driver() or sys.platform != "linux" else CPU_INDEX
        index = os.environ.get("TORCH_INDEX_URL") or default
        options: list[str] = []
        if index and answers(index):
            # Only torch itself comes from there; what it depends on follows with the project.
            self.stamp(project="")
            options = ["--no-deps", "--extra-index-url", index]
        build = build_of_torch(environment, self.pins["torch"], options[1:])
        kind = "CPU" if "+cpu" in build or sys.platform != "linux" else "CUDA"
        if missing := self.missing_space(environment, kind):
            raise UserError(" ".join(missing))
        what = f"torch {build}, {kind} build, {BYTES_FOR_TORCH[kind][1] / 1e9:.1f} GB to download"
        other = "for another index: make setup TORCH_INDEX_URL=..."
        if index and not options:
            print(f"  {index} does not answer, and pip's own index has {what}; {other}")
        elif has_gpu_driver() and kind == "CPU":
            print(f"  NVIDIA's driver is installed, but pip's index has only {what}; {other}")
        self.step(what, environment.pip("install", *options, wanted))

    def step(self, title: str, command: list[str]) -> None:
        """Run a command with a line that shows the time; its output goes to the log.

        Raises:
            UserError: it failed; with the end of what it said.
        """
        started = time.monotonic()
        draw(f"  {title} ...") or print(f"  {title} ...", flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            code = self.call(command, log, lambda: draw(f"  {title} ... {elapsed(started)}"))
        outcome = "done" if code == 0 else "failed"
        draw("")
        print(f"  {title}: {outcome} after {elapsed(started)}", flush=True)
        if code != 0:
            said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = "\n".join(f"  | {line}" for line in said[-8:])
            raise UserError(
                f"{title} could not be installed; it said:\n{last}\nThe full log: {self.log}\n"
                "Run this again when the cause is mended: the finished steps stay."
            )

    def call(
        self, command: list[str], output: IO[str] | None = None, tick: Callable[[], object] = bool
    ) -> int:
        """Run a command to its end, and return its exit code.

        A terminal sends Ctrl-C to every process in the foreground. The command runs in a session of
        its own, so that it gets one SIGINT, from here, and no second one while it cleans up.

        Args:
            command: the program and its arguments.
            output: the file for what it prints; None: where this process prints.
            tick: called about once a second while it runs.
        """
        errors = None if output is None else subprocess.STDOUT
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=1)
                tick()
        except KeyboardInterrupt:
            end_group(process)
            raise

    def is_made_here(self) -> bool:
        """Whether the set-up made the environment, and not another tool."""
        return bool(self.stamps().get("made_here"))

    def is_done(self, step: str) -> bool:
        """Whether `step` was finished with the inputs it has now, and its result is still there."""
        pattern = {"project": "horovod_lm-*", "horovod": "horovod-*+lm.*"}[step]
        there = any(self.installed(pattern)) and (self.folder / "bin" / "python").exists()
        return there and self.stamps().get(step) == self.digest(step)

    def installed(self, pattern: str) -> list[str]:
        """Return the names and versions of installed packages, as their folders are called."""
        python = os.path.basename(os.path.realpath(self.folder / "bin" / "python"))
        lib = python if re.fullmatch(r"python3\.\d+", python) else "python3.*"
        packages = self.folder.glob(f"lib/{lib}/site-packages/{pattern}.dist-info")
        return sorted(package.name for package in packages)

    def stamp(self, **stamps: str | bool) -> None:
        """Remember finished steps; the file is replaced as a whole or not at all."""
        new = self.stamps_path.with_suffix(".new")
        new.write_text(json.dumps(self.stamps() | stamps, indent=2) + "\n", encoding="utf-8")
        new.replace(self.stamps_path)

    def stamps(self) -> dict[str, str | bool]:
        """Return what is remembered; empty without a readable file."""
        try:
            return dict(json.loads(self.stamps_path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def digest(self, step: str) -> str:
        """Return a hash of what `step` depends on."""
        files = [ROOT / "pyproject.toml"]
        inputs = [EXTRAS, str(ROOT)]
        if step == "horovod":
            files = sorted((ROOT / "horovod_lm/setup/patches").glob("*.patch"))
            inputs = [*self.installed("torch-*"), *self.horovod_options]
        inputs += [file.read_text(encoding="utf-8") for file in files]
        return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def find_environment(folder: Path) -> Environment | None:
    """Return the environment in `folder`, or None if there is no Python in it.

    Raises:
        UserError: there is a Python that does not run; it may run later, so nothing is changed.
    """
    python = folder / "bin" / "python"
    command = [str(python), "-c", DESCRIBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        said = done.stderr or done.stdout
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        done, said = None, str(error.strerror)
    if done is None or done.returncode != 0 or MARK not in done.stdout:
        last = (said.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(
            f"{python} does not run ({last}), and nothing was changed; mend that, or choose "
            "another folder: make setup VENV=..."
        )
    answer = done.stdout.split(MARK, 1)[1].splitlines()[0]
    version, include, has_pip, torch = json.loads(answer)
    return Environment(folder, tuple(version), Path(include), has_pip, torch)


def former_folder(folder: Path) -> Path | None:
    """Return where an environment was made, if it was moved or copied since; else None."""
    for script in folder.glob("bin/pip*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = re.search(r"""(/.*)/bin/python[\d.]*["\s]""", script.read_text("utf-8")[:1000])
            if found and not is_same(Path(found.group(1)), folder):
                return Path(found.group(1))
    return None


def rewrite_scripts(folder: Path, moved_from: Path) -> None:
    """Make the scripts in bin/ that start the Python of `moved_from` start the one in `folder`."""
    old = re.escape(f"{moved_from}/bin/".encode())
    # As pip writes it: a plain line, or sh's `exec` where the path is long or has a blank.
    plain, through_sh = (
        rb"%b(python[\d.]*)\n",
        rb"/bin/sh\n'''exec' \"?%b(python[\d.]*)\"? .*\n' '''\n",
    )
    first_lines = re.compile(rb"\A#!(?:" + plain % old + rb"|" + through_sh % old + rb")")
    # pip's own come last: `former_folder` reads them, so that a mend cut short is begun again.
    for script in sorted(folder.glob("bin/*"), key=lambda path: path.name.startswith("pip")):
        if script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        if found := first_lines.match(content):
            python = str(folder / "bin" / (found.group(1) or found.group(2)).decode())
            line = f"#!{python}\n"
            if " " in python or len(line) > 127:
                line = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"
            script.write_bytes(line.encode() + content[found.end() :])


def read_pins(pyproject: Path) -> dict[str, str]:
    """Return the versions that the set-up needs: torch's, and the oldest of torch and of Python.

    Python 3.10 has no reader of TOML, so they are found by the shape of their lines.

    Raises:
        UserError: one of them is not there.
    """
    text = pyproject.read_text(encoding="utf-8")
    patterns = {
        "torch": r'^torch = "([^"]+)"',
        "oldest_torch": r'^\s*"torch>=([^"]+)"',
        "oldest_python": r'^requires-python = ">=([^"]+)"',
    }
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise UserError(f"{pyproject} does not say which versions to use ({', '.join(missing)})")
    return {name: match.group(1) for name, match in found.items() if match}


def build_of_torch(environment: Environment, pin: str, options: Sequence[str]) -> str:
    """Return which build of the pinned torch pip would take, such as 2.13.0+cpu.

    Without a local version after the plus it is PyPI's, which is built with CUDA on Linux. That is
    also the answer when the index cannot be asked.
    """
    command = environment.pip("index", "versions", "torch", *options)
    said = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    found = re.search(rf"(?<![\w.]){re.escape(pin)}(\+[\w.]+)?(?![\w.])", said)
    return found.group() if found else pin


def numbers(version: str) -> tuple[int, ...]:
    """Return the major and the minor number of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def pip_cache() -> Path:
    """Return the folder in which pip keeps what it has downloaded."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PIP_CACHE_DIR") or os.path.join(base, "pip")).expanduser()


def answers(index: str) -> bool:
    """Return whether a package index that has torch answers within a few seconds."""
    try:
        with urlopen(f"{index.rstrip('/')}/torch/", timeout=SECONDS_FOR_INDEX) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing."""
    return next(folder.iterdir(), None) is None


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one folder that exists."""
    return one.exists() and other.exists() and one.samefile(other)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children once, wait until they are done, kill what is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(SECONDS_TO_STOP)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def draw(line: str) -> bool:
    """On a terminal, draw `line` over the one before; return whether this is a terminal."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)
    return sys.stdout.isatty()


def elapsed(started: float) -> str:
    """Return the time since `started`, as 3m05s."""
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes}m{seconds:02d}s"


def make_command(target: str, folder: Path) -> str:
    """Return the call of make that uses an environment, for a message."""
    if folder.absolute() == ROOT / ".venv":
        return f"make {target}"
    return f"make {target} VENV={shlex.quote(str(folder))}"


def next_steps(folder: Path, cd: bool) -> str:
    """Return how to use an environment from a shell: lines to paste.

    Args:
        folder: the environment.
        cd: the shell is in another folder than the project.
    """
    if (folder / "conda-meta").is_dir():
        activate = f"conda activate {shlex.quote(str(folder))}"
    else:
        activate = f"source {shlex.quote(shown(folder / 'bin' / 'activate'))}"
    lines = [f"cd {shlex.quote(str(ROOT))}"] if cd else []
    lines += [activate, "horovodrun -np 2 python -m horovod_lm.train --config configs/tiny.yaml"]
    lines = [f"    {line}" for line in lines]
    return "\n".join(
        [
            "To train in a terminal:",
            *lines,
            f"To open the course in JupyterLab: {make_command('lab', folder)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="make setup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--venv",
        type=Path,
        default=ROOT / ".venv",
        help="the environment to make or to use; an active one: $VIRTUAL_ENV or $CONDA_PREFIX",
    )
    parser.add_argument(
        "--horovod-options",
        default="",
        metavar="OPTIONS",
        help="for horovod_lm.setup.install_horovod, for example '--mpi'",
    )
    parser.add_argument("--next", action="store_true", help="say how to use the environment")
    parser.add_argument("--cd", action="store_true", help="say `cd` to the project, too")
    arguments = parser.parse_args(argv)
    folder = arguments.venv.absolute()
    # The end of a terminal, or a job's time limit, cleans up as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    Setup(folder, shlex.split(arguments.horovod_options)).run()
    if arguments.next:
        print(next_steps(folder, arguments.cd))
    return 0
