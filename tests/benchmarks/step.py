"""One training step: tokens per second and peak memory of our model and `transformers`' GPT-2.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py            # speed
    OMP_NUM_THREADS=1 python tests/benchmarks/step.py --memory   # peak memory at vocabulary 50257

A step is forward, loss, backward, and torch's AdamW; the same shapes, float32, dropout 0, same
threads. Steps take turns and their medians are compared; with one thread the clock is the process's
CPU time (see generation.py). Peak memory is ru_maxrss of a new process at its end, less that of a
process with a model of almost no size.

"plain loss" is our model with the whole matrix of logits and torch's cross_entropy, to measure the
chunked loss. `--nanogpt PATH` compares nanoGPT's `model.py` too, which is not part of this project.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.options import parser_of

SHAPES = {  # vocabulary, width, heads, layers, batch, length
    "5M": (4096, 240, 6, 6, 8, 256),
    "30M": (8192, 512, 8, 8, 4, 256),
    "50k vocabulary": (50257, 256, 8, 6, 8, 256),
}
MEMORY_SHAPES = {
    "small model, 4096 tokens": (50257, 256, 8, 6, 16, 256),
    "GPT-2 small, 2048 tokens": (50257, 768, 12, 12, 4, 512),
    "GPT-2 small, 8192 tokens (configs/config.yaml)": (50257, 768, 12, 12, 16, 512),
}


def build_ours(vocab_size, width, heads, layers, length):
    from horovod_lm.models.transformer_lm import TransformerLM

    model = TransformerLM(vocab_size, width, heads, layers, 4 * width, length, dropout=0.0)
    return model, lambda ids: model(ids, labels=ids, return_logits=False)[1]


def build_plain_loss(*sizes):
    model, _ = build_ours(*sizes)
    return model, lambda ids: model(ids, labels=ids)[1]


def build_transformers(vocab_size, width, heads, layers, length):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_embd=width, n_head=heads, n_layer=layers, n_positions=length,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            use_cache=False,
        )
    )  # fmt: skip
    return model, lambda ids: model(ids, labels=ids).loss


def build_nanogpt(vocab_size, width, heads, layers, length, path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(
        module.GPTConfig(
            block_size=length, vocab_size=vocab_size, n_layer=layers, n_head=heads, n_embd=width,
            dropout=0.0, bias=True,
        )
    )  # fmt: skip
    # nanoGPT takes the targets shifted; -1 is what it ignores.
    return model, lambda ids: model(ids, torch.cat([ids[:, 1:], ids[:, :1] * 0 - 1], 1))[1]


def make_step(build, shape, *extra, amp_dtype=None):
    """A function that takes one step on torch's default device and returns the loss."""
    *sizes, batch, length = shape
    torch.manual_seed(0)
    model, loss_of = build(*sizes, length, *extra)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    ids = torch.randint(0, sizes[0], (batch, length))

    def step():
        with torch.autocast(ids.device.type, amp_dtype, enabled=amp_dtype is not None):
            loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def speed(names: list[str], rounds: int, nanogpt: str | None) -> None:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for name in names:
        shape = SHAPES[name]
        steps = {
            "ours": make_step(build_ours, shape),
            "plain loss": make_step(build_plain_loss, shape),
            "transformers": make_step(build_transformers, shape),
        }
        if nanogpt:
            steps["nanoGPT"] = make_step(build_nanogpt, shape, nanogpt)
        times: dict[str, list[float]] = {label: [] for label in steps}
        for number in range(rounds + 1):
            for label, step in steps.items():
                start = clock()
                step()
                if number:  # the first round warms up
                    times[label].append(clock() - start)
        n_tokens = shape[-1] * shape[-2]
        rates = {label: n_tokens / statistics.median(t) for label, t in times.items()}
        print(f"{name}: batch {shape[-2]} x {shape[-1]}, vocabulary {shape[0]}")
        for label, rate in rates.items():
            print(f"  {label:13} {rate:8.0f} tokens/s   ours is {rates['ours'] / rate:.2f} of it")


def peak(label: str, shape_name: str) -> float:
    """Run two steps in a new process; return its peak memory in GB."""
    command = [sys.executable, __file__, "--peak-of", label, shape_name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e9


def report_peak(label: str, shape_name: str) -> None:
    build = {"ours": build_ours, "transformers": build_transformers}[label]
    step = make_step(build, MEMORY_SHAPES.get(shape_name, (8, 8, 1, 1, 1, 8)))
    for _ in range(2):  # the second has the optimizer's states from its start
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def memory(names: list[str]) -> None:
    for name in names:
        ours, theirs = (
            peak(label, name) - peak(label, "nothing") for label in ("ours", "transformers")
        )
        print(
            f"{name}: ours {ours:.2f} GB, transformers {theirs:.2f} GB, ratio {ours / theirs:.2f}"
        )


def main() -> None:
    parser = parser_of(__doc__, SHAPES, rounds=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nanogpt", metavar="PATH", help="nanoGPT's model.py, to compare with too")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument(
        "--shapes", type=int, default=2, metavar="N", help="the first N shapes; 3 needs 20 GB"
    )
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        report_peak(*arguments.peak_of)
    elif arguments.memory:
        memory(list(MEMORY_SHAPES)[: arguments.shapes])
    else:
        print(f"torch {torch.__version__}, {arguments.threads} thread(s)")
        speed(arguments.sizes, arguments.rounds, arguments.nanogpt)


if __name__ == "__main__":
    main()
