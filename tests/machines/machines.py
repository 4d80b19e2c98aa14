"""Run the course on other systems, each in a root of its own made by debootstrap.

    make machines                                     # the default rows
    make machines ROWS="trixie bookworm:g++-11:python=/opt/python-3.10"

A row is SUITE[:COMPILER][:python=FOLDER]. SUITE is any suite of Debian or Ubuntu whose mirror
answers. COMPILER is a package such as g++-11 or clang-19 of that suite, used as CXX. FOLDER holds
bin/python3 (a standalone build, or a version of pyenv) and is mounted read-only at the same path.

For each row an ordinary user clones the current commit into a path with a space and runs
`make setup`, `make example` and a part of the tests there. A table of versions, times and results
is printed; the exit code is 0 when every row passed. Roots are kept for the next run, logs too;
what a row has installed is removed when the row has passed.

Root is needed, and debootstrap. All mounts are made in a mount namespace and processes in a PID
namespace, so that nothing is left of a run that is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_ROWS = ["bookworm", "trixie", "forky"]
PACKAGES = "ca-certificates g++ git make procps python3 python3-dev python3-venv"
TESTS = (
    "tests/installation tests/horovod tests/jupyter/test_magics.py tests/models/test_gpt2.py"
    " tests/test_train_resume.py tests/test_doctor.py tests/notebooks/test_notebooks.py"
)
HOME = str(Path("/home") / "student")
COURSE = f"{HOME}/my course"  # the space is on purpose
MINUTES = {"setup": 45, "example": 45, "tests": 45}
FREE_GB = 15  # torch with CUDA takes 5.8 GB, and 2.6 GB more while it is installed
SCRIPTS = Path("/usr/share/debootstrap/scripts")
HEADER = "| row | compiler | Python | torch | set-up | example | tests | result |"


class RowError(Exception):
    """A row that cannot be made or did not pass; the text says why."""


class Row:
    """One line of the table, from its text SUITE[:COMPILER][:python=FOLDER]."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.suite, *options = text.split(":")
        self.python = next(
            (Path(one[len("python=") :]) for one in options if one.startswith("python=")), None
        )
        self.compiler = next((one for one in options if not one.startswith("python=")), None)
        known = bool(self.python) + bool(self.compiler)
        if not re.fullmatch(r"[a-z]+", self.suite) or len(options) > known:
            raise SystemExit(f"error: {text!r} is not SUITE[:COMPILER][:python=FOLDER]")
        if self.python and not (self.python / "bin" / "python3").exists():
            raise SystemExit(f"error: {text!r}: there is no bin/python3 in {self.python}")

    @property
    def name(self) -> str:
        """The row as it is shown, and as its folders are called: no path of this machine."""
        python = f"python-{self.python.name}" if self.python else None
        return "_".join(filter(None, [self.suite, self.compiler, python]))


# ---- outside: one process with namespaces of its own for each row --------------------------------


def main() -> int:
    """Run the rows one after the other and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: {' '.join(DEFAULT_ROWS)}")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "horovod_lm-machines",
        help="folder for roots and logs; a row needs up to 10 GB there (default: %(default)s)",
    )
    parser.add_argument("--mirror", help="where debootstrap gets packages (default: its own)")
    parser.add_argument("--keyring", help="the keys of that mirror (default: debootstrap's own)")
    parser.add_argument("--tests", default=TESTS, help="arguments of pytest (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep what a row that passed installed")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.cache = arguments.cache.absolute()
    if arguments.inside:
        return run_inside(Row(arguments.inside), arguments)
    rows = [Row(text) for text in arguments.rows or DEFAULT_ROWS]
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("error: make machines needs root and debootstrap (apt-get install debootstrap)")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if arguments.cache.stat().st_uid != 0:
        sys.exit(f"error: {arguments.cache} belongs to another user; choose a folder with --cache")
    os.nice(10)
    commit = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if output("git", "-C", str(ROOT), "status", "--porcelain"):
        print("warning: the project has uncommitted changes; the rows run without them")
    lines = [HEADER, re.sub(r"[^|]+", "---", HEADER)]
    failed = 0
    for row in rows:
        print(f"== {row.name}: logs in {arguments.cache / 'logs' / row.name}", flush=True)
        found = run_row(row, arguments)
        columns = "compiler python torch setup example tests result".split()
        lines.append("| " + " | ".join([row.name, *(found.get(c, "") for c in columns)]) + " |")
        print(lines[-1], flush=True)
        failed += found["result"] != "passed"
    print(f"\nCommit {commit}, {date.today()}, {os.cpu_count()} cores\n\n" + "\n".join(lines))
    return bool(failed)


def run_row(row: Row, arguments: argparse.Namespace) -> dict[str, str]:
    """Run a row in its namespaces, and remove what it installed if it passed."""
    logs, work = arguments.cache / "logs" / row.name, arguments.cache / "rows" / row.name
    for folder in (logs, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    free = shutil.disk_usage(arguments.cache).free / 1e9
    if free < FREE_GB:
        return {"result": f"not run: {free:.0f} GB free in {arguments.cache}, {FREE_GB} needed"}
    # bash is process 1 of the namespace: it reaps the orphans that tests leave to it.
    init = ["bash", "-c", '"$@"; exit $?', "init", sys.executable, __file__, *sys.argv[1:]]
    namespaces = "setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child=KILL".split()
    subprocess.run([*namespaces, *init, "--inside", row.text], stdin=subprocess.DEVNULL)
    try:
        found = json.loads((logs / "result.json").read_text())
    except FileNotFoundError:
        return {"result": "was killed"}
    if found["result"] == "passed" and not arguments.keep:
        shutil.rmtree(work)
    return found


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---- inside: root, mounts, the steps -------------------------------------------------------------


def run_inside(row: Row, arguments: argparse.Namespace) -> int:
    """Make the root where it is missing, run the row, and write result.json."""
    logs = arguments.cache / "logs" / row.name
    found: dict[str, str] = {"result": "passed"}
    try:
        pristine = arguments.cache / "roots" / row.suite
        if not pristine.exists():
            make_root(row.suite, pristine, arguments, logs / "root.log")
        run_steps(row, pristine, arguments, logs, found)
    except RowError as error:
        found["result"] = f"FAILED: {error}"
    (logs / "result.json").write_text(json.dumps(found))
    return 0


def make_root(suite: str, place: Path, arguments: argparse.Namespace, log: Path) -> None:
    """A root with compiler, Python and an ordinary user, under its name only when it is whole."""
    script = SCRIPTS / suite
    if not script.exists():  # a suite newer than this debootstrap
        script = SCRIPTS / "sid"
    ubuntu = "ubuntu" in script.read_text()
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    command = ["debootstrap", "--variant=minbase", "--force-check-gpg"]
    command += ["--components=main,universe"] if ubuntu else []
    command += [f"--keyring={arguments.keyring}"] if arguments.keyring else []
    # "" is debootstrap's default mirror.
    command += [suite, str(part), arguments.mirror or "", str(script)]
    run(command, log, minutes=30, what="debootstrap")
    mount_system(part)
    in_root(
        part,
        f"apt-get update && apt-get install -y --no-install-recommends {PACKAGES}",
        log,
        30,
        "apt-get",
    )
    in_root(part, "useradd --create-home --shell /bin/bash student", log, 1, "useradd")
    for mounted in ("run", "sys", "proc", "dev", "etc/resolv.conf", "etc/hosts"):
        run(["umount", "--recursive", str(part / mounted)], log, 1, "umount")
    part.rename(place)


def mount_system(root: Path) -> None:
    """What every process expects, and how this machine reaches the network."""
    for mount in (
        f"-t proc proc {root}/proc",
        f"--rbind /sys {root}/sys",
        f"--rbind /dev {root}/dev",
        f"-t tmpfs -o mode=1777 tmpfs {root}/dev/shm",
        f"-t tmpfs -o mode=0755 tmpfs {root}/run",
    ):
        subprocess.run(["mount", *mount.split()], check=True)
    for file in ("/etc/resolv.conf", "/etc/hosts"):
        show(Path(file), root)
    settings = output("apt-config", "dump").splitlines()
    wanted = [line for line in settings if re.match(r"Acquire::(https?|Check|Retries)", line)]
    (root / "run/apt.conf").write_text("\n".join(wanted) + "\n")


def show(path: Path, root: Path) -> None:
    """Mount a file or folder of this machine in the root, read-only, at the same path."""
    place = root / path.relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(exist_ok=True) if path.is_dir() else place.touch()
    for parent in place.relative_to(root).parents:  # /root is closed to an ordinary user
        (root / parent).chmod((root / parent).stat().st_mode | 0o111)
    subprocess.run(["mount", "--bind", path, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)


def run_steps(
    row: Row, pristine: Path, arguments: argparse.Namespace, logs: Path, found: dict[str, str]
) -> None:
    """Set-up, example and tests on a copy of the root; fill in the columns of the table."""
    work = arguments.cache / "rows" / row.name
    for folder in ("upper", "work", "root"):
        (work / folder).mkdir()
    layers = f"lowerdir={pristine},upperdir={work}/upper,workdir={work}/work"
    root = work / "root"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)], check=True)
    mount_system(root)
    variables = pip_settings(root)
    if row.python:
        show(row.python, root)
    if row.compiler:
        install = f"apt-get update && apt-get install -y {shlex.quote(row.compiler)}"
        in_root(root, install, logs / "root.log", 15, f"apt-get install {row.compiler}")
        c = row.compiler.replace("g++", "gcc")
        variables |= {"CXX": row.compiler.replace("clang", "clang++"), "CC": c}
    bundle = ["git", "-C", str(ROOT), "bundle", "create", f"{root}/tmp/project.bundle", "HEAD"]
    run(bundle, logs / "clone.log", 2, "git bundle")

    def step(name: str, command: str) -> None:
        started = time.monotonic()
        try:
            in_root(root, command, logs / f"{name}.log", MINUTES[name], name, variables)
        finally:
            seconds = round(time.monotonic() - started)
            found[name] = f"{seconds // 60}m{seconds % 60:02d}s"

    def ask(command: str) -> str:
        log = logs / "versions.log"
        in_root(root, command, log, 2, command, variables)
        return log.read_text().splitlines()[-1]

    python = f"{row.python}/bin/python3" if row.python else "python3"
    clone = f"git clone -q /tmp/project.bundle {shlex.quote(COURSE)}"
    in_root(root, f"cd / && {clone}", logs / "clone.log", 2, "git clone", variables)
    found["compiler"] = "GCC " + ask("${CXX:-c++} -dumpfullversion")
    found["python"] = ask(f"{python} -c 'import platform; print(platform.python_version())'")
    step("setup", f"make setup PYTHON={python}")
    found["torch"] = ask(".venv/bin/python -c 'import torch; print(torch.__version__)'")
    step("example", f"make example PYTHON={python}")
    try:
        step("tests", f".venv/bin/python -m pytest -q {arguments.tests}")
    finally:
        summary = re.findall(r"=+ (.*) in [\d.]+s", (logs / "tests.log").read_text())
        found["tests"] += f" ({summary[-1]})" if summary else ""


def pip_settings(root: Path) -> dict[str, str]:
    """This machine's settings of pip as variables; the folders they name are shown in the root."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.lower().endswith("_proxy") or name == "TORCH_INDEX_URL"
    }
    paths = set()
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        value = value.strip("'").replace("\\n", " ")
        variables["PIP_" + name.rpartition(".")[2].upper().replace("-", "_")] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if word.startswith("file://"):
                path = path.parent  # an index's files lie beside it
            if path.is_absolute() and path.exists():
                paths.add(path)
    for path in sorted(paths):
        show(path, root)
    return variables


def in_root(
    root: Path,
    command: str,
    log: Path,
    minutes: float,
    what: str,
    variables: dict[str, str] | None = None,
) -> None:
    """Run a shell command in the root: as root, or with `variables` as the user in the course."""
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
    if variables is None:
        env |= {"DEBIAN_FRONTEND": "noninteractive", "APT_CONFIG": "/run/apt.conf"}
        user = []
    else:
        env |= {"HOME": HOME, "USER": "student", **variables}
        user = ["--userspec=student:student", "--groups="]
        command = f"[ ! -d {shlex.quote(COURSE)} ] || cd {shlex.quote(COURSE)}; {command}"
    settings = [f"{name}={value}" for name, value in env.items()]
    shell = ["env", "-i", *settings, "sh", "-c", command]
    run(["chroot", *user, str(root), *shell], log, minutes, what)


def run(command: list[str], log: Path, minutes: float, what: str) -> None:
    """Run a command to its end with everything it prints in the log.

    Raises:
        RowError: it failed, or took longer than its limit.
    """
    with log.open("a") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=60 * minutes
            ).returncode
        except subprocess.TimeoutExpired:
            raise RowError(f"{what}: not done after {minutes} minutes, see {log.name}") from None
    if code != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise RowError(f"{what}: exit code {code}, see {log.name} ({last[:120]})")


if __name__ == "__main__":
    sys.exit(main())
