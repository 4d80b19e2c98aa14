"""Run the course on other systems, each in a root of its own made by debootstrap.

    make machines                                     # the default rows
    make machines ROWS="trixie bookworm:g++-11:python=/opt/python-3.10"

A row is SUITE[:COMPILER][:PYTHON]; README.md beside this file explains it. For each row an ordinary
user clones the current commit into a path with a space and runs `make setup`, `make example` and a
part of the tests there. A table of versions, times and results is printed; the exit code is 0 when
every row passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
DEFAULT_ROWS = ["bookworm", "trixie", "forky:g++-15:python3.13"]
PACKAGES = "ca-certificates g++ git make procps python3 python3-dev python3-venv"
TESTS = (
    "tests/setup tests/horovod tests/jupyter/test_magics.py tests/models/test_gpt2.py"
    " tests/notebooks/test_notebooks.py"
    " tests/faults/test_lost_ranks.py"
)
HOME = str(Path("/home") / "student")
COURSE = shlex.quote(f"{HOME}/my course")  # the space is on purpose
FREE_GB = 15  # torch with CUDA takes 5.8 GB, and 2.6 GB more while it is installed
SCRIPTS = Path("/usr/share/debootstrap/scripts")
COLUMNS = ["row", "compiler", "Python", "torch", "set-up", "example", "tests", "result"]


class RowError(Exception):
    """A row cannot be prepared or did not pass; the text is the reason."""


class Row:
    """One line of the table, from its text SUITE[:COMPILER][:PYTHON]."""

    def __init__(self, text: str, options: argparse.Namespace) -> None:
        self.text, self.options = text, options
        compiler, python = r"((?:g\+\+|clang)-\d+)", r"(python3\.\d+|python=[^:]+)"
        found = re.fullmatch(rf"([a-z]+)(?::{compiler})?(?::{python})?", text)
        if not found:
            sys.exit(f"error: {text!r} is not SUITE[:COMPILER][:PYTHON]")
        self.suite, self.compiler, self.python = found.groups()
        self.folder: Path | None = None  # of a Python of this machine
        if self.python and self.python.startswith("python="):
            self.folder = Path(self.python.removeprefix("python=")).absolute()
            if not (self.folder / "bin/python3").exists():
                sys.exit(f"error: {text!r}: there is no bin/python3 in {self.folder}")
            self.python = f"python-{self.folder.name}"
        # Its folders are called so too: no path of this machine is in it.
        self.name = "_".join(filter(None, [self.suite, self.compiler, self.python]))
        self.logs = options.cache / "logs" / self.name
        self.work = options.cache / "rows" / self.name
        self.root = options.cache / "roots" / f"{self.suite}.part"  # of the next commands
        self.variables: dict[str, str] = {}
        self.found = {"row": self.name, "result": "passed"}

    def run(self) -> dict[str, str]:
        """Run the row in namespaces of its own; if it passed, remove what it installed."""
        for folder in (self.logs, self.work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        free = shutil.disk_usage(self.work).free / 1e9
        if free < FREE_GB:
            return self.found | {"result": f"not run: {free:.0f} GB free, {FREE_GB} needed"}
        command = "setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child=KILL".split()
        # bash is process 1 of the namespace: it reaps the orphans that tests leave to it.
        command += ["bash", "-c", '"$@"; exit $?', "init", sys.executable, __file__, *sys.argv[1:]]
        subprocess.run([*command, "--inside", self.text], stdin=subprocess.DEVNULL)
        result = self.logs / "result.json"
        found = json.loads(result.read_text()) if result.exists() else {"result": "was killed"}
        if found["result"] == "passed":
            shutil.rmtree(self.work)
        return self.found | found

    def run_inside(self) -> None:
        """Create the root if it is missing, run the steps, and write result.json."""
        pristine = self.root.with_suffix("")
        try:
            if not pristine.exists():
                self.make_root(pristine)
            self.copy_root(pristine)
            self.run_steps()
        except RowError as error:
            self.found["result"] = f"FAILED: {error}"
        (self.logs / "result.json").write_text(json.dumps(self.found))

    def make_root(self, place: Path) -> None:
        """Create a root with compiler, Python and an ordinary user; its name appears at the end."""
        script = SCRIPTS / self.suite
        if not script.exists():  # a suite newer than this debootstrap
            script = SCRIPTS / "sid"
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        command = ["debootstrap", "--variant=minbase", "--force-check-gpg"]
        if "ubuntu" in script.read_text():
            command.append("--components=main,universe")
        if self.options.keyring:
            command.append(f"--keyring={self.options.keyring}")
        mirror = self.options.mirror or ""  # "": the suite's own
        self.execute("debootstrap", 30, [*command, self.suite, str(self.root), mirror, str(script)])
        self.mount_system()
        self.install(PACKAGES)
        self.as_root("useradd", 1, "useradd --create-home --shell /bin/bash student")
        for mounted in ("run", "sys", "proc", "dev", "etc/resolv.conf", "etc/hosts"):
            subprocess.run(["umount", "--recursive", self.root / mounted], check=True)
        self.root.rename(place)

    def copy_root(self, pristine: Path) -> None:
        """Mount a writable layer over the root, and this machine's files that the row needs."""
        for folder in ("upper", "work", "root"):
            (self.work / folder).mkdir()
        self.root = self.work / "root"
        layers = f"lowerdir={pristine},upperdir={self.work}/upper,workdir={self.work}/work"
        mount("-t", "overlay", "-o", layers, "overlay", self.root)
        self.mount_system()
        self.variables, paths = pip_settings()
        for path in sorted({*paths, *([self.folder] if self.folder else [])}):
            self.show(path)
        kept = self.options.cache / "horovod" / self.name
        kept.mkdir(parents=True, exist_ok=True)
        self.as_user("mounts", 1, "mkdir -p .cache/horovod_lm")
        mount("--bind", kept, self.root / HOME[1:] / ".cache/horovod_lm")
        self.as_root("mounts", 1, f"chown student {HOME}/.cache/horovod_lm")
        if self.compiler:
            self.install(shlex.quote(self.compiler))
            self.variables["CC"] = self.compiler.replace("g++", "gcc")
            self.variables["CXX"] = self.compiler.replace("clang", "clang++")
        if self.python and not self.folder:
            self.install(f"{self.python} {self.python}-dev {self.python}-venv")

    def mount_system(self) -> None:
        """Mount the system's folders, and this machine's settings for the network."""
        mount("-t", "proc", "proc", self.root / "proc")
        mount("--rbind", "/sys", self.root / "sys")
        mount("--rbind", "/dev", self.root / "dev")
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", self.root / "dev/shm")
        mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", self.root / "run")
        for file in ("/etc/resolv.conf", "/etc/hosts"):
            self.show(Path(file))
        settings = re.findall(
            r"(?m)^Acquire::(?:http|Check|Retries).*", output("apt-config", "dump")
        )
        (self.root / "run/apt.conf").write_text("\n".join(settings))

    def show(self, path: Path) -> None:
        """Mount a file or folder of this machine in the root, read-only, at the same path."""
        place = self.root / path.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True) if path.is_dir() else place.touch()
        for parent in place.relative_to(self.root).parents:  # /root is closed to ordinary users
            (self.root / parent).chmod((self.root / parent).stat().st_mode | 0o111)
        mount("--bind", path, place)
        mount("-o", "remount,bind,ro", place)

    def run_steps(self) -> None:
        """Run set-up, example and tests, and fill in their columns of the table."""
        bundle = self.root / "tmp/project.bundle"
        create = ["git", "-C", str(PROJECT), "bundle", "create", str(bundle), "HEAD"]
        self.execute("clone", 2, create)
        self.as_user("clone", 2, f"git clone -q /tmp/project.bundle {COURSE}")
        python = f"{self.folder}/bin/python3" if self.folder else self.python or "python3"
        self.found["compiler"] = self.ask("${CXX:-c++} --version | head -n 1")
        self.found["Python"] = self.ask(f"{python} --version").split()[1]
        self.step("set-up", f"make setup PYTHON={python}")
        if "wheel kept" in (self.logs / "set-up.log").read_text():
            self.found["set-up"] += " (Horovod kept from an earlier run)"
        torch = "import torch; print(torch.__version__)"
        self.found["torch"] = self.ask(f"{COURSE}/.venv/bin/python -c {shlex.quote(torch)}")
        self.step("example", f"make example PYTHON={python}")
        try:
            self.step("tests", f".venv/bin/python -m pytest {TESTS}")
        finally:
            summary = re.findall(r"=+ (.*) in [\d.]+s", (self.logs / "tests.log").read_text())
            self.found["tests"] += f" ({summary[-1]})" if summary else ""

    def step(self, name: str, command: str) -> None:
        """Run a command in the project and note how long it takes."""
        started = time.monotonic()
        try:
            self.as_user(name, 120, f"cd {COURSE} && {command}")
        finally:
            seconds = round(time.monotonic() - started)
            self.found[name] = f"{seconds // 60}m{seconds % 60:02d}s"

    def ask(self, command: str) -> str:
        """Return the last line that a command prints."""
        self.as_user("versions", 2, command)
        return (self.logs / "versions.log").read_text().splitlines()[-1]

    def install(self, packages: str) -> None:
        """Install Debian packages in the root."""
        command = f"apt-get update && apt-get install -y --no-install-recommends {packages}"
        self.as_root("apt-get", 30, command)

    def as_root(self, name: str, minutes: float, command: str) -> None:
        """Run a shell command in the root."""
        settings = {"DEBIAN_FRONTEND": "noninteractive", "APT_CONFIG": "/run/apt.conf"}
        self.execute(name, minutes, self.chroot([], settings, command))

    def as_user(self, name: str, minutes: float, command: str) -> None:
        """Run a shell command in the root as the ordinary user, with this machine's pip."""
        settings = {"HOME": HOME, "USER": "student", **self.variables}
        user = ["--userspec=student:student", "--groups="]
        self.execute(name, minutes, self.chroot(user, settings, f"cd && {command}"))

    def chroot(self, user: list[str], settings: dict[str, str], command: str) -> list[str]:
        path = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
        env = [f"{name}={value}" for name, value in {**path, **settings}.items()]
        return ["chroot", *user, str(self.root), "env", "-i", *env, "sh", "-c", command]

    def execute(self, name: str, minutes: float, command: list[str]) -> None:
        """Run a command with its output in the log of that name.

        Raises:
            RowError: it failed, or took longer than its limit.
        """
        log = self.logs / f"{name}.log"
        how = {"stderr": subprocess.STDOUT, "timeout": 60 * minutes}
        try:
            with log.open("a") as file:
                code = subprocess.run(command, stdout=file, **how).returncode
        except subprocess.TimeoutExpired:
            raise RowError(f"{name}: not done after {minutes} minutes") from None
        if code != 0:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise RowError(f"{name}: exit code {code} ({last[:120].strip('= ')})")


def mount(*arguments: str | Path) -> None:
    """Mount something in this process's namespace."""
    subprocess.run(["mount", *arguments], check=True)


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def pip_settings() -> tuple[dict[str, str], set[Path]]:
    """Return this machine's settings of pip and its proxies as variables, and the paths in them."""
    passed_on = re.compile(r".*_proxy|TORCH_INDEX_URL", re.IGNORECASE)
    variables = {name: value for name, value in os.environ.items() if passed_on.fullmatch(name)}
    paths = set()
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        value = value.strip("'").replace("\\n", " ")
        variables["PIP_" + name.rpartition(".")[2].upper().replace("-", "_")] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            # The files of an index lie beside it.
            paths.add(path.parent if word.startswith("file://") else path)
    return variables, {path for path in paths if path.is_absolute() and path.exists()}


def main() -> int:
    """Run the rows one after the other and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(tempfile.gettempdir()) / "horovod_lm-machines"
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: {' '.join(DEFAULT_ROWS)}")
    parser.add_argument(
        "--cache", type=Path, default=cache, metavar="FOLDER",
        help=f"for roots and logs; a row needs {FREE_GB} GB free there (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--mirror", help="where debootstrap gets packages (default: the suite's)")
    parser.add_argument("--keyring", help="the keys of that mirror (default: the suite's)")
    parser.add_argument("--inside", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cache = options.cache.absolute()
    if options.inside:
        Row(options.inside, options).run_inside()
        return 0
    rows = [Row(text, options) for text in options.rows or DEFAULT_ROWS]
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("error: make machines needs root and debootstrap (apt-get install debootstrap)")
    os.nice(10)
    # A shell starts its background jobs with SIGINT ignored, and all that they start inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.cache.stat().st_uid != 0:
        sys.exit(f"error: {options.cache} belongs to another user; choose a folder with --cache")
    if output("git", "-C", str(PROJECT), "status", "--porcelain"):
        print("warning: the project has uncommitted changes; the rows run without them")
    table = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        commit = output("git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD")
        print(f"{row.name} at {commit}, {date.today()}; logs: {row.logs}", flush=True)
        found = row.run()
        table.append([found.get(column, "") for column in COLUMNS])
        print("; ".join(table[-1]), flush=True)
    print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in table))
    return int(any(line[-1] != "passed" for line in table[2:]))


if __name__ == "__main__":
    sys.exit(main())
