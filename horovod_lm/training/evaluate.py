"""Evaluation: loss, perplexity and accuracy over a loader, and the log-probability of texts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from horovod_lm.models.loss import IGNORE_INDEX, shift_labels, token_losses
from horovod_lm.models.transformer_lm import TransformerLM

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer

WINDOWS_PER_BATCH = 16  # in `score_texts`


@dataclass(frozen=True)
class Evaluation:
    """Sums over predicted tokens, not means, so that ranks can add them."""

    nats: float = 0.0  # summed cross-entropy
    tokens: int = 0  # predicted tokens
    correct: int = 0  # tokens whose most likely prediction was the target

    @property
    def loss(self) -> float:
        """Mean nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def accuracy(self) -> float:
        """Fraction of tokens predicted correctly, 0 to 1; NaN without tokens."""
        return self.correct / self.tokens if self.tokens else math.nan


def perplexity(mean_loss: float) -> float:
    """Return exp of a mean loss in nats per token; infinite if exp overflows."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def evaluate(
    model: TransformerLM,
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str | None = None,
    autocast: AbstractContextManager | None = None,
    max_batches: int | None = None,
) -> Evaluation:
    """Sum losses and correct predictions over a loader, in this process only.

    Args:
        model: evaluated without dropout and gradients; its mode is restored afterwards.
        loader: batches with `input_ids` and `labels` (B, T); `attention_mask` is optional, and B
            may be 0.
        device: the model's device; None: that of its parameters.
        autocast: for example `torch.autocast("cpu", torch.bfloat16)`; None: full precision.
        max_batches: maximum number of batches; None: all.
    """
    device = device or next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, correct
    with _evaluation_mode(model), autocast or nullcontext():
        for number, batch in enumerate(loader):
            if max_batches is not None and number >= max_batches:
                break
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            attention_mask = batch.get("attention_mask")
            hidden = model.hidden_states(batch["input_ids"], attention_mask)  # (B, T, C)
            targets = shift_labels(batch["labels"], attention_mask).flatten()  # (B, T) -> (N,)
            losses, predictions = token_losses(
                hidden.flatten(0, 1), model.token_embedding.weight, targets
            )  # (B, T, C) -> (N, C)
            # Summed on the device: reading a number from a GPU waits for its work.
            sums += torch.stack(
                [
                    losses.double().sum(),
                    (targets != IGNORE_INDEX).sum(),
                    (predictions == targets).sum(),
                ]
            )
    nats, tokens, correct = sums.tolist()
    return Evaluation(nats, int(tokens), int(correct))


def score_texts(
    model: TransformerLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device | str | None = None,
) -> list[float]:
    """Return -log p of each text and its end, in nats.

    As in the training data, end-of-text precedes a text and is predicted after it. A text longer
    than the model's context is processed in windows that overlap by half; each token is scored
    once, with at least half a context before it.

    `device` is the model's; None: that of its parameters.
    """
    device = device or next(model.parameters()).device
    windows = [
        (number, *window)
        for number, text in enumerate(texts)
        for window in _windows(
            [tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id], model.max_seq_len
        )
    ]
    windows.sort(key=lambda window: len(window[1]))  # similar lengths together: less padding
    totals = [0.0] * len(texts)
    with _evaluation_mode(model):
        for start in range(0, len(windows), WINDOWS_PER_BATCH):
            batch = windows[start : start + WINDOWS_PER_BATCH]
            # Padding on the right needs no mask: attention is causal.
            inputs = _pad([inputs for _, inputs, _ in batch], tokenizer.eot_id).to(device)  # (B, T)
            targets = _pad([targets for _, _, targets in batch], IGNORE_INDEX).to(device)  # (B, T)
            hidden = model.hidden_states(inputs).flatten(0, 1)  # (B, T, C) -> (N, C)
            losses, _ = token_losses(hidden, model.token_embedding.weight, targets.flatten())
            nats = losses.double().view(targets.shape).sum(dim=1)  # (N,) -> (B, T) -> (B,)
            for (number, _, _), value in zip(batch, nats.tolist(), strict=True):
                totals[number] += value
    return totals


def _windows(ids: list[int], max_seq_len: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut ids into (inputs, targets): each id except the first is a target exactly once."""
    inputs, targets = ids[:-1], ids[1:]
    end = 0
    while end < len(inputs):
        scored = end
        end = min(len(inputs), end + (max_seq_len if end == 0 else max(1, max_seq_len // 2)))
        start = max(0, end - max_seq_len)
        yield inputs[start:end], [IGNORE_INDEX] * (scored - start) + targets[scored:end]


def _pad(rows: list[list[int]], value: int) -> Tensor:
    """Stack rows of different lengths to (B, T), padded on the right."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


def _without_compilation() -> AbstractContextManager:
    """Keep a compiled model from being compiled again, without gradients, for a few batches."""
    is_loaded = "torch._dynamo" in sys.modules  # importing it takes seconds
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _without_compilation():
            yield
    finally:
        model.train(was_training)
