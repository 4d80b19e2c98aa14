"""Models of `bench.py` and their training step: ours, `transformers`' GPT-2, nanoGPT's.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py       # peak memory at vocabulary 50257
    python tests/benchmarks/step.py profile ours 30M        # the operators of a step, by their time

All have the same shapes and dropout 0, and each its own optimizer: ours and `transformers` train
with torch's fused AdamW, nanoGPT with what its `configure_optimizers` returns. nanoGPT's `model.py`
is not part of this project; its path is given. "plain" is our model with the full matrix of logits
and torch's cross_entropy, to measure the chunked loss.

Peak memory is ru_maxrss of a new process at its end, less that of a process with a model of almost
no size.
"""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

Shape = tuple[int, int, int, int, int, int]  # vocabulary, width, heads, layers, batch, length
SHAPES: dict[str, Shape] = {
    "5M": (4096, 240, 6, 6, 8, 256),
    "30M": (8192, 512, 8, 8, 4, 256),
    "18M, vocabulary 50257": (50257, 256, 8, 6, 8, 256),
}
MEMORY_SHAPES: dict[str, Shape] = {
    "nothing": (8, 8, 1, 1, 1, 8),
    "small model, 4096 tokens": (50257, 256, 8, 6, 16, 256),
    "GPT-2 small, 2048 tokens": (50257, 768, 12, 12, 4, 512),
    "GPT-2 small, 8192 tokens (configs/config.yaml)": (50257, 768, 12, 12, 16, 512),
}

LossOf = Callable[[torch.nn.Module, Tensor], Tensor]


def build(
    name: str, shape: Shape, nanogpt: str = ""
) -> tuple[torch.nn.Module, LossOf, torch.optim.Optimizer]:
    """Return a model in training mode, its loss of (model, ids (B, T)), and its optimizer.

    Args:
        name: ours, plain, transformers or nanoGPT.
        shape: see `Shape`.
        nanogpt: path of nanoGPT's model.py.
    """
    vocab_size, width, heads, layers, _, length = shape
    torch.manual_seed(0)
    if name == "nanoGPT":
        spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt)
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.GPT(
            module.GPTConfig(
                block_size=length, vocab_size=vocab_size, n_layer=layers, n_head=heads,
                n_embd=width, dropout=0.0, bias=True,
            )
        )  # fmt: skip
        device = torch.get_default_device().type
        return model, _nanogpt_loss, model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    if name == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size, n_embd=width, n_head=heads, n_layer=layers,
                n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
                eos_token_id=0, use_cache=False,
            )
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        return model.train(), lambda model, ids: model(ids, labels=ids).loss, optimizer
    from horovod_lm.models.transformer_lm import TransformerLM
    from horovod_lm.training.optimizer import build_optimizer
    from horovod_lm.utils.config import TrainingConfig

    model = TransformerLM(vocab_size, width, heads, layers, 4 * width, length, dropout=0.0)
    model.to(torch.get_default_device())
    optimizer = build_optimizer(model, TrainingConfig())

    def loss_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
        return model(ids, labels=ids, return_logits=name == "plain")[1]

    return model.train(), loss_of, optimizer


def _nanogpt_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """nanoGPT takes the targets shifted; -1 is what it ignores."""
    return model(ids, torch.cat([ids[:, 1:], ids[:, :1] * 0 - 1], 1))[1]


def step_function(
    model: torch.nn.Module,
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Callable[[], Tensor]:
    """Return a function that takes one step on random tokens and returns the loss.

    A GPU works on when it returns; reading the loss waits for it. `dtype` is that of the matrix
    products, by autocast; `seed` is that of the tokens.
    """
    vocab_size, batch, length = shape[0], *shape[-2:]
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(0, vocab_size, (batch, length), generator=generator)

    def take_step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return take_step


def make_step(
    name: str, shape: Shape, nanogpt: str = "", dtype: torch.dtype = torch.float32, compiled=False
) -> Callable[[], Tensor]:
    """Return a function that takes one training step of a new model and returns the loss."""
    model, loss_of, optimizer = build(name, shape, nanogpt)
    if compiled and hasattr(model, "compile_layers"):  # ours, as `training.compile` does it
        model.compile_layers()
    elif compiled:
        model = torch.compile(model)
    return step_function(model, loss_of, optimizer, shape, dtype)


def peak(name: str, shape_name: str) -> float:
    """Run two steps in a new process; return its peak memory in GB."""
    command = [sys.executable, __file__, name, shape_name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e9


def main() -> None:
    if sys.argv[1:2] == ["profile"]:
        take_step = make_step(sys.argv[2], SHAPES[sys.argv[3]])
        take_step()
        with torch.profiler.profile() as found:
            for _ in range(3):
                take_step()
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
        return
    if sys.argv[1:]:
        take_step = make_step(sys.argv[1], MEMORY_SHAPES[sys.argv[2]])
        for _ in range(2):  # the second has the optimizer's states from its start
            take_step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    for shape_name in list(MEMORY_SHAPES)[1:]:
        ours, theirs = (
            peak(name, shape_name) - peak(name, "nothing") for name in ("ours", "transformers")
        )
        print(f"{shape_name}: {ours:.2f} GB, transformers {theirs:.2f}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
