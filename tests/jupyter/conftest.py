"""What the tests of ranks in Jupyter share: who is left, and a kernel like JupyterLab's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from horovod_lm.train import run_distributed_training
from horovod_lm.utils.config import load_config
from tests.conftest import alive

needs_horovod = pytest.mark.horovod


def children() -> list[psutil.Process]:
    """Every process that this one has started and that still lives, but for Python's own."""
    return [child for child in psutil.Process().children(recursive=True) if is_left_over(child)]


def is_left_over(child: psutil.Process) -> bool:
    """Say whether a process should have ended.

    Two servers of `multiprocessing`, once a test has used workers, live as long as pytest does.
    """
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
        return alive(child) and not any("from multiprocessing." in one for one in child.cmdline())
    return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition; return how long it took, or fail the test."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            pytest.fail(f"{what} did not come within {seconds} s")
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture(scope="session")
def past_run(tiny_project) -> Path:
    """The folder of a run of one process that is over."""
    config = load_config(tiny_project / "configs" / "tiny.yaml")
    return run_distributed_training(config, 0, 1, 0, run_name="past").run_dir


def _nothing_left():
    """Fail the test, or the last one of the module, if a process is left behind."""
    before = {child.pid for child in children()}
    yield
    wait_until(
        lambda: {child.pid for child in children()} <= before, 10, "the end of every process"
    )


nothing_left = pytest.fixture(_nothing_left)
nothing_left_by_module = pytest.fixture(_nothing_left, scope="module")


class Kernel:
    """A real kernel, asked as a front end asks it."""

    def __init__(self, folder) -> None:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(
            kernel_name="python3", cwd=str(folder), extra_arguments=["--log-level=ERROR"],
            independent=True,
        )  # fmt: skip

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
    started.run("%load_ext horovod_lm.jupyter")
    yield started
    started.close()
