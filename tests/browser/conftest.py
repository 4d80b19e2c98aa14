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
PATIENCE = 90  # seconds for whatever must come: other tests may keep the machine busy


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

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/api/status", params={"token": TOKEN}, timeout=5)
                return
            except requests.ConnectionError:
                time.sleep(0.1)
        pytest.fail(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")

    def start_kernel(self, name: str) -> str:
        """Start the notebook's session before the page asks for it; return the kernel's id."""
        session = requests.post(
            f"{self.url}/api/sessions",
            params={"token": TOKEN},
            json={"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}},
            timeout=60,
        )
        session.raise_for_status()
        return session.json()["kernel"]["id"]

    def kernels(self) -> list[psutil.Process]:
        """Every kernel's process."""
        return [child for child in self.children() if _is_kernel(child)]

    def end_kernels(self) -> None:
        for session in requests.get(
            f"{self.url}/api/sessions", params={"token": TOKEN}, timeout=10
        ).json():
            requests.delete(
                f"{self.url}/api/sessions/{session['id']}", params={"token": TOKEN}, timeout=60
            )

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


def _is_kernel(process: psutil.Process) -> bool:
    try:
        return any("ipykernel" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # it ended while we looked
        return False


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


def asked_for_pictures() -> str | None:
    """Return the folder that the widgets' pictures are to go to, if any."""
    return os.environ.get("HOROVOD_LM_SCREENSHOTS")


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
        self.page.set_default_timeout(1000 * PATIENCE)
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
        self.page.evaluate(
            "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
        )

    def run_cell(self, number: int) -> None:
        """Run one more cell, without waiting for its end."""
        self.page.evaluate(
            """number => { const app = window.jupyterapp;
                app.shell.currentWidget.content.activeCellIndex = number;
                app.commands.execute('notebook:run-cell'); }""",
            number,
        )

    def interrupt(self) -> None:
        """Press the Stop button."""
        self.page.evaluate(
            "() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel'); }"
        )

    def wait_for(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until an output shows a text."""
        self.page.wait_for_function(
            "text => [...document.querySelectorAll('.jp-OutputArea-output')]"
            ".some(output => output.innerText.includes(text))",
            arg=text, timeout=seconds * 1000,
        )  # fmt: skip

    def wait_until_idle(self, seconds: float = PATIENCE) -> None:
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

    def screenshot(self, name: str) -> None:
        """Take pictures of the first output, light and dark, where they are asked for.

        HOROVOD_LM_SCREENSHOTS names the folder that they go to, as `name.png` and `name_dark.png`.
        """
        folder = asked_for_pictures()
        if not folder:
            return
        self.page.set_viewport_size({"width": 1300, "height": 1700})
        for theme, ending in (("Dark", "_dark"), ("Light", "")):
            self.choose_theme(theme)
            self.page.wait_for_timeout(500)  # the theme's colours fade in
            output = self.page.locator(".jp-OutputArea-output").first
            output.screenshot(path=Path(folder) / f"{name}{ending}.png")

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
    """What opens cells of code as a notebook, for the time of a test."""
    opened: list[Page] = []

    def open_cells(*cells: str) -> Page:
        opened.append(open_page(lab, chromium, *cells))
        return opened[-1]

    yield open_cells
    for page in opened:
        page.close()


@pytest.fixture(scope="session")
def storyteller(tmp_path_factory) -> Path:
    """A checkpoint of a model that has read some stories: a folder to load it from."""
    import torch

    from horovod_lm.data.synthetic.stories import generate_stories
    from horovod_lm.data.tokenizers import train_bpe
    from horovod_lm.models.transformer_lm import TransformerLM
    from horovod_lm.training.checkpoint import save_checkpoint
    from horovod_lm.utils.config import config_from_dict

    stories = list(generate_stories(400, seed=0))
    tokenizer = train_bpe(stories, 512)
    ids = torch.tensor(
        [one for text in stories for one in [tokenizer.eot_id, *tokenizer.encode(text)]]
    )
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 64, "n_heads": 4, "n_layers": 2,
             "d_ff": 128, "max_seq_len": 128, "dropout": 0.0, "pad_token_id": None}  # fmt: skip
    how = {"max_new_tokens": 60, "seed": 1, "temperature": 1.0}
    config = config_from_dict({"model": sizes, "generation": how})
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TransformerLM(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        starts = torch.randint(len(ids) - 65, (8, 1), generator=generator)
        batch = ids[starts + torch.arange(64)]  # (8, 64)
        loss = model(batch, labels=batch, return_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("storyteller")
    save_checkpoint(model, None, 0, 150, loss.item(), folder, "best_model.pt",
                    config=config.to_dict(), tokenizer=tokenizer.to_json())  # fmt: skip
    return folder
