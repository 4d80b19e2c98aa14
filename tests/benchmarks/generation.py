"""Generation of `bench.py`: our `generate` and `transformers`', with the same weights.

Both use their key-value cache, the same type and the same settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from horovod_lm.generation.load import to_column_major
from horovod_lm.models.gpt2 import from_gpt2

SIZES = {
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


def pair(size: str, case: str, new_tokens: int) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return both calls of a case, and the number of tokens that each generates."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rows, prompt_length, settings = CASES[case]
    torch.manual_seed(0)
    config = GPT2Config(n_positions=1024, bos_token_id=0, eos_token_id=0, **SIZES[size])
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
