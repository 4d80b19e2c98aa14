"""Tokens per second of `TransformerLM.generate` and of `transformers`' generate, same weights.

    OMP_NUM_THREADS=1 python tests/benchmarks/generation.py

Both use their key-value cache, float32, one prompt of 16 tokens, and the same settings. The two
take turns, so that other load affects both; medians are compared. With one thread the clock is the
process's CPU time, which leaves out other processes (but not their traffic on the memory bus).
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from horovod_lm.generation.load import to_column_major
from horovod_lm.models.gpt2 import from_gpt2
from tests.benchmarks.options import parser_of

SIZES = {
    "5M": {"vocab_size": 4096, "n_embd": 240, "n_layer": 6, "n_head": 6},
    "30M": {"vocab_size": 8192, "n_embd": 512, "n_layer": 8, "n_head": 8},
}
PROMPT_LENGTH = 16


def seconds(run) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def bandwidth(megabytes: int = 512) -> float:
    """Return the memory bandwidth in bytes/s of a sum over more than any cache holds."""
    data = torch.ones(megabytes * 2**18)
    data.sum()
    return data.nbytes / min(seconds(data.sum) for _ in range(5))


def compare(name: str, new_tokens: int, rounds: int, bytes_per_second: float) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_positions=512, bos_token_id=0, eos_token_id=0, **SIZES[name])
    theirs = GPT2LMHeadModel(config).eval()
    ours = to_column_major(from_gpt2(theirs))  # as load_model_for_generation does
    prompt = torch.randint(1, config.vocab_size, (1, PROMPT_LENGTH))
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}
    size = sum(p.nbytes for p in ours.parameters())
    print(f"\n{name}: {ours.num_parameters() / 1e6:.1f} M parameters, {new_tokens} new tokens")
    for label, settings in (
        ("greedy", {}),
        ("sampled", {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
    ):
        run_ours = partial(
            ours.generate, prompt, new_tokens, eos_token_id=None, seed=0,
            **(settings or {"temperature": 0.0}),
        )  # fmt: skip
        run_theirs = partial(
            theirs.generate, prompt, attention_mask=torch.ones_like(prompt), use_cache=True,
            do_sample=bool(settings), **lengths, **settings,
        )  # fmt: skip
        run_ours(), run_theirs()
        times = [(seconds(run_ours), seconds(run_theirs)) for _ in range(rounds)]
        our_rate, their_rate = (new_tokens / statistics.median(t) for t in zip(*times, strict=True))
        print(
            f"  {label:8} ours {our_rate:7.1f} tokens/s   transformers {their_rate:7.1f}   "
            f"ratio {our_rate / their_rate:.2f}   "
            f"of the bandwidth limit {our_rate * size / bytes_per_second:.0%}"
        )


def main() -> None:
    parser = parser_of(__doc__, SIZES, rounds=5)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rate = bandwidth()
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), memory {rate / 1e9:.1f} GB/s")
    for name in arguments.sizes:
        compare(name, arguments.new_tokens, arguments.rounds, rate)


if __name__ == "__main__":
    main()
