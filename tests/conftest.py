"""Shared by many tests: a tiny configuration with its data, and real ranks under `horovodrun`."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import psutil
import pytest

# OpenMP threads that spin while they wait take the cores of other ranks and kernels: on a busy
# machine, small products then take fifty times as long. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parent.parent
HOROVODRUN = Path(sys.executable).with_name("horovodrun")
# Jobs on several hosts start `python` and `horovodrun` by name, also without an active environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

TINY = """
model: {vocab_size: 300, d_model: 16, n_heads: 2, n_layers: 2, d_ff: 32, max_seq_len: 32,
        dropout: 0.1, pad_token_id: null}
training: {per_gpu_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 1e-2,
           warmup_steps: 4, max_steps: 20, num_epochs: 2, amp_dtype: float32, log_interval: 5,
           eval_interval: 10, eval_batches: 2, checkpoint_interval: 5}
data: {source: stories, num_stories: 120, tokenizer: bpe, data_dir: data}
distributed: {stall_warning_seconds: 5, stall_shutdown_seconds: 20, gloo_timeout_seconds: 20}
seed: 7
"""


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a space in its path."""
    return make_tiny_project(tmp_path_factory.mktemp("a project"))


def make_tiny_project(root: Path) -> Path:
    """Write `configs/tiny.yaml`, a model of 10,000 parameters, and prepare its data."""
    (root / "configs").mkdir()
    (root / "configs" / "tiny.yaml").write_text(TINY, encoding="utf-8")
    from horovod_lm.data import prepare_data
    from horovod_lm.utils.config import load_config

    prepare_data(load_config(root / "configs" / "tiny.yaml"))
    return root


@dataclass(frozen=True)
class Finished:
    """Exit code, output and duration of a command."""

    code: int
    output: str
    seconds: float


class Command:
    """A command in a process group of its own; all its descendants are tracked."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: dict[str, str]) -> None:
        self.started = time.monotonic()
        self.log = cwd / f"command-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                arguments, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._descendants: dict[int, psutil.Process] = {}

    def descendants(self) -> list[psutil.Process]:
        """Return the processes that this command has started so far and that still run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._descendants.setdefault(child.pid, child)
        return [child for child in self._descendants.values() if alive(child)]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float) -> Finished:
        """Wait until the command ends; kill it and fail the test after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            self.descendants()
            time.sleep(0.1)
        seconds = time.monotonic() - self.started
        if self.process.poll() is None:
            self.kill()
            pytest.fail(f"still running after {timeout} s:\n{self.output()[-4000:]}")
        return Finished(self.process.returncode, self.output(), seconds)

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait for a condition while the command runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the condition was not met:\n{self.output()[-4000:]}")
            self.descendants()
            time.sleep(0.05)

    def left_behind(self, grace_period: float = 10) -> list[int]:
        """Return the ids of the descendants that still run after `grace_period` seconds."""
        deadline = time.monotonic() + grace_period
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [child.pid for child in left]

    def kill(self) -> None:
        for child in self.descendants():
            child.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def skip_without_horovod() -> None:
    if not HOROVODRUN.exists():
        pytest.skip("Horovod is not installed: run python -m horovod_lm.setup.install_horovod")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what needs Horovod where it is not installed."""
    if item.get_closest_marker("horovod"):
        skip_without_horovod()


def _starter(cwd: Path):
    """Yield a function that starts Python commands; kill what is left of them."""
    started: list[Command] = []

    def start(
        arguments: Sequence[str], ranks: int = 0, env: dict[str, str] | None = None
    ) -> Command:
        if ranks:
            skip_without_horovod()
        launcher = [str(HOROVODRUN), "-np", str(ranks)] if ranks else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        started.append(Command([*launcher, sys.executable, *arguments], cwd, environment))
        return started[-1]

    yield start
    for command in started:
        command.kill()


@pytest.fixture
def start(tiny_project: Path):
    """Start a Python command on `ranks` processes; 0 ranks: one process without horovodrun."""
    yield from _starter(tiny_project)


@pytest.fixture(scope="module")
def start_for_module(tiny_project: Path):
    """As `start`, for commands that several tests of a module check."""
    yield from _starter(tiny_project)


@pytest.fixture
def train(start):
    """Run `python -m horovod_lm.train` to its end on `ranks` processes, and check its exit code."""

    def run(*arguments: str, ranks: int = 0, code: int = 0, timeout: float = 180) -> Finished:
        finished = start(["-m", "horovod_lm.train", *arguments], ranks).wait(timeout)
        assert finished.code == code, finished.output[-4000:]
        return finished

    return run


# ---- the table of faults -------------------------------------------------------------------------

FAULT = "fault"
TABLE = os.environ.get("FAULTS_TABLE")  # set by `make faults`
FULL = TABLE is not None  # every fault, many times; else the short form
MAX_SECONDS_AFTER_LIMIT = 10
HEADING = "## What ran"


@pytest.fixture
def note_fault(record_property):
    """Record an injected fault for the table, and check what must hold for each."""

    def note(
        seconds: float | None,
        said: object,
        limit: float | None = None,
        left: Sequence[int] | None = None,
        resumed: str = "",
    ) -> None:
        """Add a row: the seconds until the fault was detected, and what was said.

        `limit` is the set limit in seconds, 0 for a fault that is detected at once; `left` are the
        processes that still run; `resumed` says whether the resumed run equals one without a fault.
        """
        record_property(FAULT, (seconds, str(said), limit, left, resumed))
        assert limit is None or seconds is None or seconds <= limit + MAX_SECONDS_AFTER_LIMIT
        assert not left

    return note


def pytest_terminal_summary(terminalreporter, exitstatus):
    """Print the table of injected faults; `make faults` writes it to a file."""
    ended = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [
        _row(report.nodeid, *value)
        for report in ended
        for name, value in report.user_properties
        if name == FAULT and report.when == "call"
    ]
    if not rows:
        return
    head = ["fault", "limit, s", "detected or ended, s", "processes left", "resumed", "message"]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    terminalreporter.section("faults")
    terminalreporter.write_line("\n".join(lines))
    if TABLE and exitstatus == 0:
        path = Path(TABLE)
        text = path.read_text("utf-8").partition(HEADING)[0] if path.exists() else ""
        versions = f"Python {platform.python_version()}, torch {metadata.version('torch')}"
        machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores"
        load = f"load {os.getloadavg()[2]:.0f}"
        where = f"On {date.today()}, {machine}, {load}, {versions}."
        path.write_text("\n".join([text + HEADING, "", where, "", *lines, ""]), "utf-8")


def _row(test, seconds, said, limit, left, resumed) -> list[str]:
    name = test.partition("::")[2].removeprefix("test_").replace("_", " ")
    last = said.strip().splitlines()[-1].replace("|", "\\|") if said.strip() else ""
    last = re.sub(r"/[^'\"]*/a project\d+/", "", last)  # the folder of `tiny_project`
    last = last if len(last) <= 160 else f"{last[:159]}…"
    numbers = ["" if limit is None else f"{limit:g}", "" if seconds is None else f"{seconds:.1f}"]
    return [name, *numbers, "" if left is None else str(len(left)), resumed, last]


# ---- several workers -----------------------------------------------------------------------------

# Only one worker creates network namespaces at a time: the tests check that none are left.
MAKE_HOSTS = ("test_simulated_hosts", "test_doctor_hosts", "test_job_files", "test_slurm",
              "test_ray", "test_links", "test_readme")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With `-n 2 --dist loadgroup`, keep each file's tests together: they share fixtures."""
    for item in items:
        page_09 = "09_beyond_one_machine" in item.name or "page_09" in item.name
        makes_hosts = item.path.stem in MAKE_HOSTS or page_09
        item.add_marker(pytest.mark.xdist_group("hosts" if makes_hosts else str(item.path)))
        if "note_fault" in item.fixturenames:
            item.add_marker(pytest.mark.fault)


SMALL_MODEL = {"vocab_size": 50, "d_model": 32, "n_heads": 4, "n_layers": 3, "d_ff": 64,
               "max_seq_len": 16, "dropout": 0.0, "pad_token_id": 0}  # fmt: skip


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder with files that this process may not read, also if the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for below in ("library", "library/secret", "nothing", "secret"):
            (folder / below).mkdir()
        for file in ("library/b.txt", "secret/a.txt", "hidden.txt"):
            (folder / file).write_text("text")
        for closed in ("library/secret", "secret", "hidden.txt"):
            (folder / closed).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # nobody
        yield folder
        os.seteuid(user)
        for closed in ("library/secret", "secret"):
            (folder / closed).chmod(0o755)


@pytest.fixture
def make_model():
    """Build a tiny model whose weights follow from `seed`; any setting can be changed."""

    def make(seed: int = 0, scale: float = 4.0, **changes):
        import torch

        from horovod_lm.models.transformer_lm import TransformerLM

        torch.manual_seed(seed)
        model = TransformerLM(**(SMALL_MODEL | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than GPT-2's initialisation, so that attention is not uniform, no two
                # logits nearly tie, and a wrong mask or position changes every number.
                parameter.add_(torch.randn_like(parameter) * 0.02 * scale)
        return model

    return make


@pytest.fixture
def left_padded():
    """Three prompts of 7, 4 and 1 tokens, padded on the left to (3, 7), with their mask."""
    import torch

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 50, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
    return ids * mask, mask
