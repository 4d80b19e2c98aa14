"""From a fresh machine to a ready environment: what `make setup` does.

First everything is looked for that will be needed; what is missing is said, one sentence each,
before anything starts. Then, each step skipped if it was done before:

    1. the environment     a virtual environment, or the one that was named
    2. torch               the CPU build where there is no NVIDIA GPU
    3. the project         this package in editable form, with what it depends on
    4. Horovod             built for that torch (python -m horovod_lm.install_horovod)

A step that breaks can be run again; the finished ones stay. TORCH_INDEX_URL names where the CPU
build of torch comes from (default: https://download.pytorch.org/whl/cpu).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from horovod_lm.installation import preflight
from horovod_lm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "notebooks,test"
DEFAULT_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS_FOR_INDEX = 5

# Asked of an environment that exists already, whichever Python it has.
DESCRIBE = """
import json, sys, sysconfig
try:
    from importlib.metadata import version
    torch = version("torch")
except Exception:
    torch = None
try:
    import pip
except ImportError:
    pip = None
print(json.dumps([sys.version_info[:3], sysconfig.get_path("include"), bool(pip), torch]))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment that exists: where it is, and what is in it."""

    folder: Path
    version: tuple[int, ...]
    include: Path  # where Python's headers should be
    has_pip: bool
    torch: str | None  # its version, if it is there

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.folder / "bin" / "python"

    def pip_install(self, *arguments: str) -> list[str]:
        """A call of the environment's own pip."""
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        return [*pip, "install", *arguments]


class Setup:
    """One run of the set-up: where it goes, what it logs, which steps were done before."""

    def __init__(self, folder: Path, horovod_options: Sequence[str]) -> None:
        self.folder = folder
        self.horovod_options = list(horovod_options)
        self.pins = read_pins(ROOT / "pyproject.toml")
        self.stamps_path = folder / "horovod_lm-setup.json"
        self.log = Path(tempfile.gettempdir()) / f"horovod_lm-setup-{os.getpid()}.log"

    def run(self) -> None:
        """All steps, each skipped if it was done before.

        Raises:
            UserError: something is missing, or a step failed.
        """
        if all(self.is_done(step) for step in ("project", "horovod")):
            print(f"{self.folder} is ready: nothing to do (make doctor looks closer).")
            return
        started = time.monotonic()
        environment = find_environment(self.folder)
        self.check(environment)
        print(f"setting up {self.folder}; log: {self.log}", flush=True)
        environment = environment or self.make_environment()
        if not environment.has_pip:
            command = [str(environment.python), "-m", "ensurepip", "--upgrade"]
            self.step("pip", command)
        if not is_at_least(environment.torch, self.pins["oldest_torch"]):
            self.install_torch(environment)
        if not self.is_done("project"):
            target = f"{ROOT}[{EXTRAS}]"
            self.step("the project and what it needs", environment.pip_install("-e", target))
            self.mark_done("project")
        if not self.is_done("horovod"):
            self.install_horovod(environment)
            self.mark_done("horovod")
        print(f"{self.folder} is ready, after {elapsed(started)}.")

    def check(self, environment: Environment | None) -> None:
        """Stop before anything starts if something is missing."""
        if environment is None:
            if self.folder.exists() and not (self.folder / "pyvenv.cfg").is_file():
                raise UserError(
                    f"{self.folder} is there, but is no Python environment; remove it, "
                    "or choose another place: make setup VENV=..."
                )
            cache = os.environ.get("HOROVOD_LM_CACHE") or "~"
            missing = preflight.missing_for_environment(self.folder, Path(cache).expanduser())
        else:
            missing = preflight.missing_in_environment(
                environment.python, environment.version, environment.include
            )
        if missing:
            raise UserError("\n- ".join(["before the set-up can start:", *missing]))

    def make_environment(self) -> Environment:
        """Step 1: a virtual environment, in the place of a broken one if there is one."""
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        self.step("the environment", command)
        environment = find_environment(self.folder)
        if environment is None:
            raise UserError(f"{self.folder} does not start; remove it and run this again")
        return environment

    def install_torch(self, environment: Environment) -> None:
        """Step 2: the pinned torch; its CPU build where that can be had and no GPU is here."""
        wanted = f"torch=={self.pins['torch']}"
        index = os.environ.get("TORCH_INDEX_URL") or DEFAULT_TORCH_INDEX
        if has_gpu() or sys.platform != "linux":
            self.step(wanted, environment.pip_install(wanted))
        elif answers(index):
            # Only torch itself comes from there; what it depends on follows with the project.
            arguments = [wanted, "--no-deps", "--extra-index-url", index]
            self.step(f"{wanted} for CPUs", environment.pip_install(*arguments))
        else:
            print(f"  {index} does not answer: torch comes from where pip usually looks")
            self.step(wanted, environment.pip_install(wanted))

    def install_horovod(self, environment: Environment) -> None:
        """Step 4: Horovod; its installer shows its own progress."""
        command = [str(environment.python), "-m", "horovod_lm.install_horovod"]
        if subprocess.run([*command, *self.horovod_options], cwd=ROOT).returncode != 0:
            raise UserError("Horovod is not installed, for the reason above; then run this again")

    def step(self, title: str, command: list[str]) -> None:
        """Run one command with a line that shows the time, its output going to the log.

        Raises:
            UserError: it failed; with the end of what it said.
        """
        started = time.monotonic()
        show_progress(f"  {title} ...", last=not sys.stdout.isatty())
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            while (code := wait_a_second(process)) is None:
                if sys.stdout.isatty():
                    show_progress(f"  {title} ... {elapsed(started)}")
        outcome = "done" if code == 0 else "failed"
        show_progress(f"  {title}: {outcome} after {elapsed(started)}", last=True)
        if code != 0:
            said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = "\n".join(f"  | {line}" for line in said[-8:])
            raise UserError(
                f"{title} could not be installed; it said:\n{last}\nThe full log: {self.log}\n"
                "Run this again when the cause is mended: the finished steps stay."
            )

    def is_done(self, step: str) -> bool:
        """Whether `step` was finished with the inputs it has now, and its result is still there."""
        pattern = {"project": "horovod_lm-*", "horovod": "horovod-*+lm.*"}[step]
        places = self.folder.glob(f"lib/python3.*/site-packages/{pattern}.dist-info")
        return any(places) and self._read_stamps().get(step) == self._digest(step)

    def mark_done(self, step: str) -> None:
        """Remember that `step` is finished; written whole or not at all."""
        stamps = self._read_stamps() | {step: self._digest(step)}
        new = self.stamps_path.with_suffix(".new")
        new.write_text(json.dumps(stamps, indent=2) + "\n")
        new.replace(self.stamps_path)

    def _read_stamps(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.stamps_path.read_text()))
        except (OSError, ValueError):
            return {}

    def _digest(self, step: str) -> str:
        """A hash of what `step` depends on."""
        files = {"project": ["pyproject.toml"], "horovod": ["horovod_lm/installation/repairs.py"]}
        inputs = [EXTRAS, str(ROOT), self.pins["torch"], *self.horovod_options]
        inputs += [(ROOT / file).read_text(encoding="utf-8") for file in files[step]]
        return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def find_environment(folder: Path) -> Environment | None:
    """The environment in `folder`, or None if there is none whose Python starts."""
    try:
        command = [str(folder / "bin" / "python"), "-c", DESCRIBE]
        said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        version, include, has_pip, torch = json.loads(said)
        return Environment(folder, tuple(version), Path(include), has_pip, torch)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def read_pins(pyproject: Path) -> dict[str, str]:
    """The two versions of torch that the set-up needs: the one to install, the oldest that works.

    Python 3.10 has no reader of TOML, so both are found by the shape of their lines.
    """
    text = pyproject.read_text(encoding="utf-8")
    patterns = {"torch": r'^torch = "([^"]+)"', "oldest_torch": r'^\s*"torch>=([^"]+)"'}
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise UserError(f"{pyproject} does not say which torch to install ({', '.join(missing)})")
    return {name: match.group(1) for name, match in found.items() if match}


def is_at_least(version: str | None, oldest: str) -> bool:
    """Whether an installed version will do; compares major and minor."""
    if version is None:
        return False
    numbers = [[int(part) for part in text.split(".")[:2]] for text in (version, oldest)]
    return numbers[0] >= numbers[1]


def has_gpu() -> bool:
    """Whether NVIDIA's driver is on this machine."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def answers(index: str) -> bool:
    """Whether a package index that has torch can be reached within a few seconds."""
    try:
        with urlopen(f"{index.rstrip('/')}/torch/", timeout=SECONDS_FOR_INDEX) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def wait_a_second(process: subprocess.Popen[bytes]) -> int | None:
    """The process's exit code, or None if it runs on; a Ctrl-C takes the process along."""
    try:
        return process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def show_progress(line: str, last: bool = False) -> None:
    """Draw a line over the one before on a terminal; elsewhere each line stands by itself."""
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(f"{clear}{line}", end="\n" if last else "", flush=True)


def elapsed(started: float) -> str:
    """The time since `started`, as 3m05s."""
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes}m{seconds:02d}s"


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
        help="for horovod_lm.install_horovod, for example '--mpi'",
    )
    arguments = parser.parse_args(argv)
    Setup(arguments.venv.absolute(), shlex.split(arguments.horovod_options)).run()
    return 0
