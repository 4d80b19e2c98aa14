"""What watching a run costs the kernel: its CPU seconds over the time that passes.

    python tests/benchmarks/dashboard.py

A real JupyterLab in a real Chromium, a training run of two ranks that takes many steps between two
looks. In turns: the run alone, then watched by its dashboard, which a page shows. The kernel's
processor time, in user and in system mode, is read from outside. The page says how long its frames
took while it showed the dashboard: whoever scrolls waits for them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.browser.conftest import CHROMIUM, FLAGS, Lab, Page, open_page
from tests.conftest import make_tiny_project

UPDATES, ROUNDS = 1000, 5
LAUNCH = """
from horovod_lm.jupyter.launch import launch
job = launch("configs/tiny.yaml", np=2, run_name="watched",
             overrides={"training.max_steps": 1000000, "training.num_epochs": 1000000})
"""
# Counts the calls of RunView.update.
SHOW = """
dashboard = job.dashboard()
updates, plain = [], dashboard.view.update
dashboard.view.update = lambda: updates.append(plain())
dashboard
"""
FRAMES = """() => {
    window.frames_took = [];
    let last = performance.now();
    const next = now => { frames_took.push(now - last); last = now; requestAnimationFrame(next); };
    requestAnimationFrame(next);
}"""


def cpu_share(page: Page, seconds: float) -> float:
    """Return the kernel's CPU time as a share of the next seconds."""
    [kernel] = page.lab.kernels()
    cpu, started = sum(kernel.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    return (sum(kernel.cpu_times()[:2]) - cpu) / (time.monotonic() - started)


def measure(page: Page) -> None:
    """Print the shares of every round and their medians."""
    page.run_cell(0)
    page.ask_kernel("job.status")  # when the first cell has ended
    log = page.lab.folder / "runs" / "watched" / "logs" / "rank0.jsonl"
    while not log.exists() or log.stat().st_size < 10_000:
        time.sleep(0.2)
    alone, watched, frames, steps = [], [], [], []
    for _ in range(ROUNDS):
        alone.append(cpu_share(page, 20))
        page.run_cell(1)
        page.wait_for("left")
        page.page.evaluate(FRAMES)
        before = json.loads(page.ask_kernel("print([len(updates), dashboard.view.step])"))
        # Two looks a second; asking the kernel itself would cost it something.
        watched.append(cpu_share(page, UPDATES / ROUNDS / 2))
        after = json.loads(page.ask_kernel("print([len(updates), dashboard.view.step])"))
        frames += page.page.evaluate("() => frames_took")
        steps.append([late - early for early, late in zip(before, after, strict=True)])
        page.ask_kernel("dashboard.close()")
    page.ask_kernel("job.stop()")
    print(f"{sum(n for n, _ in steps)} updates, {sum(n for _, n in steps)} steps of the run")
    for name, shares in (("alone", alone), ("watched", watched)):
        each = ", ".join(f"{share:.2%}" for share in shares)
        print(f"{name:8} median {statistics.median(shares):.2%} of a core ({each})")
    own = statistics.median(one - two for one, two in zip(watched, alone, strict=True))
    print(f"the dashboard's own: median {own:.2%} of a core")
    frames.sort()
    print(
        f"frames of the page: median {statistics.median(frames):.0f} ms, 99 of 100 within "
        f"{frames[len(frames) * 99 // 100]:.0f} ms, at most {frames[-1]:.0f} ms"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        lab = Lab(Path(folder))
        make_tiny_project(lab.folder)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = open_page(lab, browser, LAUNCH, SHOW)
            measure(page)
            page.close()
        finally:
            browser.close()
            lab.close()


if __name__ == "__main__":
    main()
