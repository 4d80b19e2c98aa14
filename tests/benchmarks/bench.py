"""Compare this package with its peers on this machine: `make bench`.

Every ratio comes from runs that took turns: in each round both sides run once, and the ratio is
that of the round's two times. The table has the median of the rounds, the lowest and the highest.

The peers: nanoGPT (`--nanogpt`: the path of its model.py, which is not part of this project) and
`transformers`, with `--compiled` both sides compiled too; our own model under DDP over Gloo, and
two processes that do not communicate, beside two Horovod ranks; `transformers`' generate; the bare
`tokenizers` library. Limits of the machine are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from horovod_lm.generation.load import to_column_major
from horovod_lm.models.attention import sdpa_attention
from horovod_lm.models.gpt2 import from_gpt2
from horovod_lm.training.checkpoint import CheckpointWriter, checkpoint_content
from horovod_lm.utils.cli import program
from horovod_lm.utils.machine import available_cores
from tests.benchmarks import step as steps
from tests.benchmarks.step import ROOT, SHAPES

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
OUT = ROOT / "runs" / "bench"
GENERATORS = {
    "5M": {"vocab_size": 4096, "n_embd": 240, "n_layer": 6, "n_head": 6},
    "30M": {"vocab_size": 8192, "n_embd": 512, "n_layer": 8, "n_head": 8},
}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # rows, tokens of the prompt, sampling
    "greedy": (1, 16, {}),
    "sampled": (1, 16, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
    "greedy, bfloat16": (1, 16, {}),
    "greedy, 8 rows": (8, 16, {}),
    "greedy, prompt of 512": (1, 512, {}),
}


@dataclass(frozen=True)
class Row:
    """One comparison: the rates of both sides, and the ratio of ours to the peer's."""

    what: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    lowest: float
    highest: float
    goal: float

    @property
    def ratio_and_range(self) -> str:
        return f"{self.ratio:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Run all in turns; return the seconds of each in every round after the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(
    what: str, seconds: Mapping[str, list[float]], amount: float, unit: str,
    goals: Mapping[str, float],
) -> Iterator[Row]:  # fmt: skip
    """Yield a row for each peer: `seconds` has the key "ours" and one for each peer in `goals`."""
    for peer, goal in goals.items():
        ratios = [b / a for a, b in zip(seconds["ours"], seconds[peer], strict=True)]
        ours, theirs = (amount / statistics.median(seconds[side]) for side in ("ours", peer))
        middle = statistics.median(ratios)
        yield Row(what, peer, ours, theirs, unit, middle, min(ratios), max(ratios), goal)


# ---- limits of the machine -----------------------------------------------------------------------


def limits() -> dict[str, float]:
    """Measure what bounds every number below: the best of several tries."""

    def best(run: Callable[[], Any], tries: int = 5) -> float:
        return min(in_turns({"": run}, tries)[""])

    found = {}
    for name, dtype in DTYPES.items():
        matrix = torch.ones(1024, 1024, dtype=dtype)
        seconds = best(partial(torch.mm, matrix, matrix))
        found[f"matrix product in {name}, GFLOP/s"] = 2 * 1024**3 / seconds / 1e9
    data = torch.ones(2**27)
    found["memory, GB/s"] = data.nbytes / best(data.sum) / 1e9
    found["loopback, GB/s"] = 2**29 / best(_send_over_loopback, 3) / 1e9
    return found


def _send_over_loopback() -> None:
    """Send 512 MiB over a TCP connection of this machine."""
    block = bytearray(2**20)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname()) as sender:
                for _ in range(512):
                    sender.sendall(block)

        thread = threading.Thread(target=send)
        thread.start()
        with server.accept()[0] as receiver:
            while receiver.recv_into(block):
                pass
        thread.join()


# ---- comparisons ---------------------------------------------------------------------------------


def step(options: argparse.Namespace) -> Iterator[Row]:
    """A training step in one process."""
    for name in ["30M"] if options.quick else SHAPES:
        for dtype_name, dtype in DTYPES.items():
            peers = ["transformers"] + ["nanoGPT"] * bool(options.nanogpt)
            for compiled in [False, True] if options.compiled else [False]:
                sides = ["ours", *peers] + ["plain"] * (not compiled)
                runs = {
                    side: steps.make_step(side, SHAPES[name], options.nanogpt, dtype, compiled)
                    for side in sides
                }
                seconds = in_turns(runs, options.rounds)
                tokens = SHAPES[name][-1] * SHAPES[name][-2]
                goals = {side: 1.0 if side == "plain" else 1.1 for side in sides[1:]}
                what = f"step, {name}, {dtype_name}{', compiled' * compiled}"
                yield from compare(what, seconds, tokens, "tokens/s", goals)


def attention(options: argparse.Namespace) -> Iterator[Row]:
    """Attention in bfloat16, forward and backward, beside torch's fused kernel."""
    for shape in ((4, 8, 256, 64), (8, 6, 256, 40), (2, 12, 512, 64)):  # (B, H, T, D)
        heads = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        fused = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        runs = {
            name: partial(_forward_and_backward, compute, heads)
            for name, compute in (("ours", sdpa_attention), ("torch's kernel", fused))
        }
        seconds = in_turns(runs, 5 * options.rounds, warm_up=3)
        goals = {"torch's kernel": 1.0}
        yield from compare(
            f"attention {shape}, bf16", seconds, shape[0] * shape[2], "tokens/s", goals
        )


def _forward_and_backward(compute: Callable[..., torch.Tensor], heads: list[torch.Tensor]) -> None:
    compute(*heads).sum().backward()


def ranks(options: argparse.Namespace) -> Iterator[Row]:
    """Two ranks with one thread each: seconds of one rank's step."""
    kinds = {"ours": ("horovod", "ours"), "DDP, our model": ("ddp", "ours"),
             "no communication": ("alone", "ours")}  # fmt: skip
    if options.nanogpt and not options.quick:
        kinds["DDP, nanoGPT"] = ("ddp", "nanoGPT")
    for dtype_name, dtype in DTYPES.items():
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name, (how, model) in kinds.items():
                taken = _two_ranks(how, model, "30M", dtype, 3 if options.quick else 5, options)
                seconds[name].append(statistics.median(taken))
        tokens = SHAPES["30M"][-1] * SHAPES["30M"][-2]
        goals = {name: 0.95 if name == "no communication" else 1.0 for name in list(kinds)[1:]}
        yield from compare(
            f"two ranks, 30M, {dtype_name}", seconds, tokens, "tokens/s of a rank", goals
        )


def _two_ranks(
    how: str, model: str, shape: str, dtype: torch.dtype, n_steps: int, options: argparse.Namespace
) -> list[float]:
    """Start two ranks and return the seconds of rank 0's steps."""
    launcher = [program("horovodrun"), "-np", "2", sys.executable]
    if how != "horovod":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--local-addr=127.0.0.1", "--nproc-per-node=2"]  # fmt: skip
    script = [str(Path(__file__).with_name("ranks.py")), how, model, shape,
              str(dtype).removeprefix("torch."), str(n_steps), options.nanogpt]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    output = subprocess.run(
        [*launcher, *script], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    # horovodrun prefixes a line with "[0]<stdout>:".
    return json.loads(output.strip().splitlines()[-1].rpartition(":")[2])


def generate(options: argparse.Namespace) -> Iterator[Row]:
    """Generation with the cache."""
    new_tokens = 60 if options.quick else 200
    for size in ["30M"] if options.quick else GENERATORS:
        for case in list(CASES)[: 3 if options.quick else None]:
            ours, theirs, tokens = _generators(size, case, new_tokens)
            seconds = in_turns({"ours": ours, "transformers": theirs}, options.rounds)
            goal = {"5M": 2.0, "30M": 1.6}[size]
            yield from compare(
                f"generation, {size}, {case}", seconds, tokens, "tokens/s", {"transformers": goal}
            )


def _generators(
    size: str, case: str, new_tokens: int
) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return both calls of a case, with the same weights, and how many tokens each generates."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rows, prompt_length, settings = CASES[case]
    torch.manual_seed(0)
    config = GPT2Config(n_positions=1024, bos_token_id=0, eos_token_id=0, **GENERATORS[size])
    theirs = GPT2LMHeadModel(config).eval()
    ours = from_gpt2(theirs)
    if case.endswith("bfloat16"):  # either as load_model_for_generation does
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    else:
        to_column_major(ours)
    prompt = torch.randint(1, config.vocab_size, (rows, prompt_length))
    run_ours = partial(
        ours.generate, prompt, new_tokens, eos_token_id=None, seed=0,
        **(settings or {"temperature": 0.0}),
    )  # fmt: skip
    run_theirs = partial(
        theirs.generate, prompt, attention_mask=torch.ones_like(prompt), use_cache=True,
        do_sample=bool(settings), min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return run_ours, run_theirs, rows * new_tokens


def save(options: argparse.Namespace) -> Iterator[Row]:
    """A checkpoint of 30 M parameters and AdamW's moments: for how long it stops the loop."""
    model, loss_of, optimizer = steps.build("ours", SHAPES["30M"])
    steps.step_function(model, loss_of, optimizer, SHAPES["30M"])()  # now there are moments
    writer = CheckpointWriter()
    seconds: dict[str, list[float]] = {"ours": [], "the whole save": []}
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        path = Path(folder, "checkpoint.pt")
        for number in range(1 + 3 * options.rounds):
            started = time.perf_counter()
            writer.write(checkpoint_content(model, optimizer, global_step=number), path)
            stopped = time.perf_counter() - started
            writer.wait()
            if number:  # the first makes the memory for the copy
                seconds["ours"].append(stopped)
                seconds["the whole save"].append(time.perf_counter() - started)
        size = path.stat().st_size / 1e9
    yield from compare("stop for a save, 30M", seconds, size, "GB/s", {"the whole save": 10.0})


def prepare(options: argparse.Namespace) -> Iterator[Row]:
    """A BPE trained on a text, and the text as token files, beside the library called directly."""
    from horovod_lm.data import prepare_data
    from horovod_lm.data.sources import open_corpus
    from horovod_lm.utils.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "text"), Path(folder, "tokens")
        settings = {
            "data.data_dir": str(out),
            "data.max_bytes": 4_000_000 if options.quick else None,
        }
        python = load_config(ROOT / "configs" / "laptop.yaml", settings)
        text.mkdir()
        for number, document in enumerate(open_corpus(python).documents()):
            (text / f"{number}.txt").write_text("".join(document.pieces()), encoding="utf-8")
        settings |= {"data.source": "files", "data.path": str(text)}
        config = load_config(ROOT / "configs" / "laptop.yaml", settings)

        def ours() -> None:
            shutil.rmtree(out, ignore_errors=True)
            prepare_data(config)

        runs = {
            "ours": ours,
            "tokenizers": lambda: _bare_tokenizer(text, config.model.vocab_size, Path(folder)),
        }
        seconds = in_turns(runs, options.rounds, warm_up=0)
        size = sum(path.stat().st_size for path in text.iterdir()) / 1e6
        yield from compare("preparing text", seconds, size, "MB/s", {"tokenizers": 0.9})


def _bare_tokenizer(text: Path, vocab_size: int, folder: Path) -> None:
    """Train and encode with the library alone; the whole text is in memory."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [path.read_text(encoding="utf-8") for path in sorted(text.iterdir())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    ids = [np.asarray(encoding.ids, np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
    np.concatenate(ids).tofile(folder / "bare.bin")


SECTIONS = {
    section.__name__: section for section in (step, attention, ranks, generate, save, prepare)
}


# ---- the results ---------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def markdown(found: Mapping[str, float], rows: list[Row], about: str) -> str:
    """Return the tables of limits and ratios."""
    lines = [about, "", "| limit of the machine | |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in found.items()]
    lines += ["", "| | peer | ours | peer's | ratio, median (range) | goal |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        missed = "" if row.ratio >= row.goal else ", missed"
        lines.append(
            f"| {row.what}, {row.unit} | {row.peer} | {_number(row.ours)} | {_number(row.theirs)}"
            f" | {row.ratio_and_range} | {row.goal:g}{missed} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Draw each ratio with its range and its goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.26 * len(rows)), layout="constrained")
    heights = range(len(rows))
    low = [row.ratio - row.lowest for row in rows]
    high = [row.highest - row.ratio for row in rows]
    axes.errorbar(
        [row.ratio for row in rows], heights, xerr=[low, high], fmt="o", label="median and range"
    )
    axes.plot([row.goal for row in rows], heights, "|", color="black", markersize=12, label="goal")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(heights, [f"{row.what} / {row.peer}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("rate of horovod_lm / rate of the peer, in the same run")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", default=[], metavar="SECTION", help=f"{', '.join(SECTIONS)}; all"
    )
    parser.add_argument("--quick", action="store_true", help="at most 5 minutes")
    parser.add_argument("--rounds", type=int, help="default: 5, or 3 with --quick")
    parser.add_argument("--nanogpt", default="", metavar="PATH", help="nanoGPT's model.py")
    parser.add_argument(
        "--compiled", action="store_true", help="steps of both sides with torch.compile too"
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    options.rounds = options.rounds or (3 if options.quick else 5)
    torch.set_num_threads(available_cores())
    about = (
        f"{time.strftime('%Y-%m-%d')}, {available_cores()} cores ({platform.machine()}), torch"
        f" {torch.__version__}, load {os.getloadavg()[0]:.1f} at the start"
    )
    found = limits()
    rows: list[Row] = []
    OUT.mkdir(parents=True, exist_ok=True)
    for name in options.sections or SECTIONS:
        for row in SECTIONS[name](options):
            print(f"{row.what} / {row.peer}: {row.ratio_and_range}", flush=True)
            rows.append(row)
    content = {"about": about, "limits": found, "rows": [asdict(row) for row in rows]}
    (OUT / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    table = markdown(found, rows, about)
    (OUT / "bench.md").write_text(table)
    draw(rows, OUT / "bench.png")
    print(f"\n{table}\nwritten to {OUT}: bench.md, bench.json, bench.png")


if __name__ == "__main__":
    main()
