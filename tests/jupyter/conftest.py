"""What the tests of ranks in Jupyter share: who is left, and a kernel like JupyterLab's."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from horovod_lm.train import run_distributed_training
from horovod_lm.utils.config import load_config

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: python -m horovod_lm.setup.install_horovod",
)


def children() -> list[psutil.Process]:
    """Every process that this one has started and that still lives, but for Python's own."""
    return [child for child in psutil.Process().children(recursive=True) if is_left_over(child)]


def is_left_over(child: psutil.Process) -> bool:
    """Say whether a process should have ended.

    Two servers of `multiprocessing`, once a test has used workers, live as long as pytest does.
    """
    try:
        if child.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any("from multiprocessing." in word for word in child.cmdline())
    except psutil.NoSuchProcess:  # it ended while we looked
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition; return how long it took, or fail the test."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            pytest.fail(f"{what} did not come within {seconds} s")
        time.sleep(0.05)
    return time.monotonic() - started


def held() -> tuple[int, int, int]:
    """Threads, listening ports, and open files of this process, when they have settled."""
    deadline = time.monotonic() + 3
    me, last = psutil.Process(), None
    while time.monotonic() < deadline:
        ports = [c for c in me.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        now = (threading.active_count(), len(ports), me.num_fds())
        if now == last:
            break
        last = now
        time.sleep(0.5)
    return now


@pytest.fixture(scope="session")
def past_run(tiny_project) -> Path:
    """The folder of a run of one process that is over."""
    config = load_config(tiny_project / "configs" / "tiny.yaml")
    return run_distributed_training(config, 0, 1, 0, run_name="past").run_dir


@pytest.fixture
def nothing_left():
    """Fail the test when it leaves a process behind."""
    before = {child.pid for child in children()}
    yield
    wait_until(
        lambda: {child.pid for child in children()} <= before, 10, "the end of every process"
    )


class Kernel:
    """A real kernel, asked as a front end asks it."""

    def __init__(self, folder) -> None:
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(
            cwd=str(folder), extra_arguments=["--log-level=ERROR"], independent=True
        )
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def start(self, code: str) -> None:
        """Ask for a cell to be run, and return at once."""
        self.request = self.client.execute(code, store_history=True)
        self.text, self.error = "", None

    def read(self, until: Callable[[], bool], seconds: float = 60) -> None:
        """Read what the cell prints until something holds, or until it has ended."""
        deadline = time.monotonic() + seconds
        while not until():
            message = self.client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != self.request:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                self.text += content["text"]
            elif message["msg_type"] == "error":
                self.error = content
            elif content.get("execution_state") == "idle":
                return

    def run(self, code: str, seconds: float = 60) -> str:
        """Run a cell to its end; return what it printed."""
        self.start(code)
        self.read(lambda: False, seconds)
        return self.text

    @property
    def pid(self) -> int:
        return self.manager.provisioner.pid

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tiny_project, nothing_left):
    """A kernel whose folder is the tiny project's, with the magics loaded."""
    started = Kernel(tiny_project)
    started.run(f"import sys; sys.executable == {sys.executable!r}")
    started.run("%load_ext horovod_lm.jupyter")
    yield started
    started.close()
