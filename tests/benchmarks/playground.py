"""The playground in a real browser: how soon the first token is there, and what streaming costs.

    OMP_NUM_THREADS=1 python tests/benchmarks/playground.py

A real JupyterLab, a real Chromium, models with random weights: their speed is that of trained ones.
Milliseconds run in the page, from the click on Generate until the browser has painted the first
token. Streaming and `generate_text` take turns in the same kernel, and the medians of their tokens
per second are compared; streaming's time is from the start to the last token, all showing included.
The browser needs a core of its own for that; on a busy machine the ratio of the kernel's CPU times,
which include every token's distribution, says what streaming itself costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import nbformat
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.browser.conftest import CHROMIUM, FLAGS, Lab, Page

SIZES = {
    "tiny": {"vocab_size": 512, "d_model": 64, "n_heads": 4, "n_layers": 2, "d_ff": 256},
    "5M": {"vocab_size": 4096, "d_model": 240, "n_heads": 6, "n_layers": 6, "d_ff": 960},
}
HOW = {"max_new_tokens": 200, "seed": 1}
SHOW = """
import asyncio, json, time, torch
from horovod_lm.data.synthetic.stories import generate_stories
from horovod_lm.data.tokenizers import train_bpe
from horovod_lm.generate import generate_text
from horovod_lm.jupyter.widgets.playground import Playground
from horovod_lm.generation.load import to_column_major
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import config_from_dict

torch.manual_seed(0)
sizes, how = json.loads('SIZES'), json.loads('HOW')
tokenizer = train_bpe(generate_stories(200, seed=0), 512)
model = to_column_major(TransformerLM(**sizes, max_seq_len=512, pad_token_id=None).eval())
with torch.no_grad():
    model.token_embedding.weight[tokenizer.eot_id] = 0  # hardly ever the end of a text
config = config_from_dict({"generation": how})
play = Playground(model, tokenizer, config)
play
"""
COMPARE = """
streamed, plain, cpu = [], [], []
for round in range(ROUNDS):
    cpu_started = time.process_time()
    play.start()
    await play._task
    cpu_streamed = time.process_time() - cpu_started
    one = play.continuation
    streamed.append(one.n_tokens / one.seconds)
    started, cpu_started = time.perf_counter(), time.process_time()
    texts = generate_text(model, tokenizer, one.prompt, **one.settings.model_dump())
    plain.append(one.n_tokens / (time.perf_counter() - started))
    cpu.append((time.process_time() - cpu_started) / cpu_streamed)
    assert texts == one.texts
print(json.dumps({"streamed": streamed, "plain": plain, "cpu": cpu}), "compared")
"""
FIRST_TOKEN = """() => new Promise(resolve => {
    const isButton = one => one.textContent.includes("Generate");
    const button = [...document.querySelectorAll("button")].find(isButton);
    const old = document.querySelector(".lm-sample");
    const started = performance.now();
    const look = () => {
        const sample = document.querySelector(".lm-sample");
        if (sample && sample !== old && sample.querySelector(".lm-token"))
            requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - started)));
        else requestAnimationFrame(look);
    };
    button.click();
    look();
})"""


def measure(lab: Lab, browser, size: str, rounds: int) -> None:
    """Measure one model and print a line of each figure."""
    code = SHOW.replace("SIZES", json.dumps(SIZES[size])).replace("HOW", json.dumps(HOW))
    cells = [code, COMPARE.replace("ROUNDS", str(rounds))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in cells])
    nbformat.write(notebook, lab.folder / f"{size}.ipynb")
    page = Page(lab, browser, f"{size}.ipynb")
    page.run_all()
    page.button("Generate").wait_for(timeout=60_000)
    page.wait_for("compared", 200)
    rates = json.loads(page.outputs()[1].split("compared")[0])
    first = []
    for _ in range(rounds):
        first.append(page.page.evaluate(FIRST_TOKEN))
        page.page.wait_for_function(
            "() => ![...document.querySelectorAll('button')]"
            ".find(one => one.textContent.includes('Generate')).disabled"
        )
    page.close()
    streamed, plain = (statistics.median(rates[name]) for name in ("streamed", "plain"))
    cpu = statistics.median(rates["cpu"])
    print(
        f"{size:5} first token after {statistics.median(first):4.0f} ms, "
        f"at most {max(first):.0f}   "
        f"streamed {streamed:6.0f} tokens/s   generate_text {plain:6.0f}   "
        f"ratio {streamed / plain:.2f}, of the kernel's CPU time {cpu:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="their median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        lab = Lab(Path(folder))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            for size in SIZES:
                measure(lab, browser, size, arguments.rounds)
        finally:
            browser.close()
            lab.close()


if __name__ == "__main__":
    main()
