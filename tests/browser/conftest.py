"""A real JupyterLab in a real browser: what a person sees and clicks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
import psutil
import pytest
import requests

from horovod_lm.data import prepare_data
from horovod_lm.train import run_distributed_training
from horovod_lm.utils.config import load_config
from tests.conftest import ROOT, alive

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Alone with this page: no look-ups and no updates in the background.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none", "autoStartDefaultKernel": True, "recordTiming": False,
    },
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
}  # fmt: skip
TOKEN = "only-this-machine"
TIMEOUT = 90  # seconds for whatever must come: other tests may keep the machine busy
SCREENSHOTS = os.environ.get("HOROVOD_LM_SCREENSHOTS")  # the folder for pictures of the widgets


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip what needs a browser where there is none, and say so."""
    if CHROMIUM is None:
        skip = pytest.mark.skip(reason="no Chromium here: apt-get install chromium")
        for item in items:
            if "browser" in Path(item.fspath).parts:
                item.add_marker(skip)


class Lab:
    """A JupyterLab on loopback, with a folder, a configuration and a runtime of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        settings = folder / "settings"
        for name, values in SETTINGS.items():
            path = settings / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "lab.log"
        self.runtime = folder / "runtime"
        env = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "IPYTHONDIR": str(folder / "ipython"),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
                 f"--port={self.port}", f"--IdentityProvider.token={TOKEN}", "--allow-root",
                 "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={self.folder}"],
                cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._wait()

    def ask(self, method: str, path: str, **options) -> requests.Response:
        """Send a request to the server."""
        return requests.request(
            method, f"{self.url}/api/{path}", params={"token": TOKEN}, timeout=60, **options
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("GET", "status")
                return
            except requests.ConnectionError:
                time.sleep(0.1)
        pytest.fail(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")

    def start_kernel(self, name: str) -> str:
        """Start the notebook's session before the page asks for it; return the kernel's id."""
        kernel = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}}
        session = self.ask("POST", "sessions", json=kernel)
        session.raise_for_status()
        return session.json()["kernel"]["id"]

    def kernels(self) -> list[psutil.Process]:
        """Every kernel's process."""
        return [child for child in self.children() if "ipykernel" in command_of(child)]

    def end_kernels(self) -> None:
        for session in self.ask("GET", "sessions").json():
            self.ask("DELETE", f"sessions/{session['id']}")

    def children(self) -> list[psutil.Process]:
        """Every process that this JupyterLab has started and that lives."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in family if alive(child)]

    def close(self) -> None:
        family = self.children()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in family:
            if child.is_running():
                child.kill()


def command_of(process: psutil.Process) -> str:
    """Return a process's command line; empty if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


# Of a module, not of the session: other tests count their processes, and Playwright keeps an event
# loop running in this thread, beside which no other can run.
@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    started = Lab(tmp_path_factory.mktemp("lab"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """One notebook, open in the lab.

    Attributes:
        page: Playwright's, for whatever a person would do.
        complaints: what the browser's console called an error.
    """

    def __init__(self, lab: Lab, chromium, name: str) -> None:
        self.lab, self.name = lab, name
        self.complaints: list[str] = []
        self.kernel_id = lab.start_kernel(name)
        self.page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        self.page.set_default_timeout(1000 * TIMEOUT)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{lab.url}/lab/tree/{name}?token={TOKEN}&reset")
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell?.currentWidget?.sessionContext !== undefined",
        )
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")

    def _listen(self, message) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def run_all(self) -> None:
        """Run every cell, without waiting for their ends."""
        self.command("notebook:run-all-cells")

    def run_cell(self, number: int) -> None:
        """Run one more cell, without waiting for its end."""
        self.page.evaluate(
            """number => { const app = window.jupyterapp;
                app.shell.currentWidget.content.activeCellIndex = number;
                app.commands.execute('notebook:run-cell'); }""",
            number,
        )

    def command(self, name: str) -> None:
        """Start one of JupyterLab's commands, without waiting for its end."""
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)

    def wait_for(self, text: str, seconds: float = TIMEOUT) -> None:
        """Wait until an output shows a text."""
        self.page.wait_for_function(
            "text => [...document.querySelectorAll('.jp-OutputArea-output')]"
            ".some(output => output.innerText.includes(text))",
            arg=text, timeout=seconds * 1000,
        )  # fmt: skip

    def wait_until_idle(self, seconds: float = TIMEOUT) -> None:
        """Wait until the kernel is ready and has nothing to do."""
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget.sessionContext"
            ".session?.kernel?.status === 'idle'",
            timeout=seconds * 1000,
        )

    def ask_kernel(self, code: str) -> str:
        """Run code past the page, as another program would; return what it prints."""
        from jupyter_client.blocking import BlockingKernelClient

        client = BlockingKernelClient()
        client.load_connection_file(self.lab.runtime / f"kernel-{self.kernel_id}.json")
        client.start_channels()
        said: list[str] = []
        try:
            client.execute_interactive(
                code, timeout=30,
                output_hook=lambda message: said.append(message["content"].get("text", "")),
            )  # fmt: skip
        finally:
            client.stop_channels()
        return "".join(said).strip()

    def outputs(self) -> list[str]:
        """Return the text that each code cell shows."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.jp-CodeCell')].map(cell =>
                [...cell.querySelectorAll('.jp-OutputArea-output')]
                    .map(output => output.innerText).join("\\n"))"""
        )

    def button(self, name: str):
        """A widget's button, by what is written on it."""
        return self.page.locator("button.jupyter-button").filter(has_text=name)

    def output(self, place: int = 0):
        """The first output of a code cell."""
        return self.page.locator(".jp-CodeCell").nth(place).locator(".jp-OutputArea-output").first

    def picture(self, place: int = 0, unlike: str = "") -> str:
        """Wait for a picture in an output, unlike an earlier one, and return its address."""
        self.page.wait_for_function(
            "([one, old]) => one.naturalWidth > 900 && one.src !== old",
            arg=[self.output(place).locator("img").element_handle(), unlike],
        )
        return self.output(place).locator("img").get_attribute("src")

    def choose_theme(self, name: str) -> None:
        """Change JupyterLab's colours: to `Light` or `Dark`."""
        self.page.evaluate(
            "name => { window.jupyterapp.commands.execute('apputils:change-theme',"
            " {theme: `JupyterLab ${name}`}); }",
            name,
        )
        self.page.wait_for_function(
            "isLight => document.body.dataset.jpThemeLight === isLight",
            arg="true" if name == "Light" else "false",
        )
        # Two splash screens within 200 ms: JupyterLab takes the one away twice, and complains.
        self.page.wait_for_function("() => !document.getElementById('jupyterlab-splash')")

    def screenshot(self, name: str, place: int = 0) -> None:
        """Take pictures of an output, light and dark, if SCREENSHOTS names a folder."""
        if not SCREENSHOTS:
            return
        self.page.set_viewport_size({"width": 1300, "height": 1700})
        for theme, ending in (("Dark", "_dark"), ("Light", "")):
            self.choose_theme(theme)
            self.page.wait_for_timeout(500)  # the theme's colours fade in
            self.output(place).screenshot(path=Path(SCREENSHOTS) / f"{name}{ending}.png")

    def close(self) -> None:
        self.page.close()
        self.lab.end_kernels()


def open_page(lab: Lab, chromium, *cells: str) -> Page:
    """Open cells of code as a notebook in JupyterLab."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, lab.folder / "page.ipynb")
    return Page(lab, chromium, "page.ipynb")


@pytest.fixture
def open_notebook(lab, chromium):
    """Return a function that opens cells of code as a notebook until the end of the test."""
    opened: list[Page] = []

    def open_cells(*cells: str) -> Page:
        opened.append(open_page(lab, chromium, *cells))
        return opened[-1]

    yield open_cells
    for page in opened:
        page.close()


@pytest.fixture(scope="session")
def storyteller(tiny_project) -> Path:
    """The folder of a finished run: a model of 2 layers and 4 heads that has read some stories."""
    sizes = {"vocab_size": 512, "d_model": 64, "n_heads": 4, "d_ff": 128, "max_seq_len": 128}
    changes = {
        "model": {**sizes, "dropout": 0.0},
        "data": {"num_stories": 400, "data_dir": "storyteller"},
        "training": {"max_steps": 150, "num_epochs": 20, "per_gpu_batch_size": 8},
        "generation": {"max_new_tokens": 60, "seed": 1, "temperature": 1.0},
    }
    config = load_config(tiny_project / "configs" / "tiny.yaml", changes)
    prepare_data(config)
    return run_distributed_training(config, 0, 1, 0, run_name="storyteller").run_dir
