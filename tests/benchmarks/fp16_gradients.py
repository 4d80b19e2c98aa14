"""The error of gradients in float16, which `distributed.compression=fp16` sends.

python tests/benchmarks/fp16_gradients.py
"""

from __future__ import annotations

import torch

from horovod_lm.data import generate_stories, train_bpe
from horovod_lm.models.transformer_lm import TransformerLM

SMALLEST_NORMAL = 2.0**-14  # 6.1e-5; below it float16 has fewer than 11 significant bits
MODELS = {
    "161,536 parameters": ({"d_model": 64, "n_heads": 4, "n_layers": 2, "d_ff": 256}, 2e-3, 300),
    "3.4 M parameters": ({"d_model": 256, "n_heads": 4, "n_layers": 4, "d_ff": 1024}, 3e-4, 100),
}


def describe(gradient: torch.Tensor) -> str:
    """Compare a gradient (n,) with its float16 copy."""
    gradient = gradient.double()
    error = gradient.half().double() - gradient
    nonzero = gradient != 0
    relative = (error / gradient)[nonzero].abs()
    off = (relative > 0.01).double().mean()
    small = (gradient[nonzero].abs() < SMALLEST_NORMAL).double().mean()
    lost = (relative == 1).double().mean()
    return (
        f"{small:.0%} of the elements below 6.1e-5, {off:.0%} off by more than 1 %, "
        f"{lost:.2%} become 0; error of the whole gradient {error.norm() / gradient.norm():.2%}"
    )


def main() -> None:
    """Print the comparison at the first step and after training."""
    tokenizer = train_bpe(generate_stories(2000, seed=0), 1000)
    documents = tokenizer.encode_batch(list(generate_stories(4000, seed=1)))
    tokens = torch.tensor([token for ids in documents for token in (tokenizer.eot_id, *ids)])
    for name, (sizes, learning_rate, steps) in MODELS.items():
        torch.manual_seed(0)
        model = TransformerLM(tokenizer.vocab_size, max_seq_len=64, dropout=0.0, **sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        for step in range(steps + 1):
            starts = torch.randint(0, len(tokens) - 64, (16,)).tolist()
            ids = torch.stack([tokens[start : start + 64] for start in starts])  # (B, T)
            optimizer.zero_grad()
            loss = model(ids, labels=ids, return_logits=False)[1]
            loss.backward()
            if step in (0, steps):
                gradients = [parameter.grad.flatten() for parameter in model.parameters()]
                print(f"{name}, step {step}, loss {loss:.2f}: {describe(torch.cat(gradients))}")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


if __name__ == "__main__":
    main()
