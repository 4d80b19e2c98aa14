"""How good a model is: loss, perplexity and accuracy over a loader, and nats per text.

Everything here is one process's own sum. Sums over ranks add up to the sum over all data, averages
do not: so ranks add their sums first (`Evaluation` is three numbers) and divide once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from horovod_lm.models.loss import IGNORE_INDEX, shift_labels, token_losses
from horovod_lm.models.transformer_lm import TransformerLM

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Sums over predicted tokens; `+` joins two of them.

    Attributes:
        nats: summed cross-entropy.
        tokens: how many tokens were predicted.
        correct: for how many the likeliest token was the right one.
    """

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.nats + other.nats, self.tokens + other.tokens, self.correct + other.correct
        )

    @property
    def loss(self) -> float:
        """Mean nats per token; not a number when there was none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean loss): as unsure as a fair choice among so many tokens."""
        return perplexity(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of tokens that were guessed right, 0 to 1; not a number when there was none."""
        return self.correct / self.tokens if self.tokens else math.nan


def perplexity(mean_loss: float) -> float:
    """Turn a mean loss in nats per token into a perplexity; infinite where exp overflows."""
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
    """Sum loss and right guesses over a loader, on this process alone.

    Args:
        model: evaluated without dropout, without gradients; its mode is put back afterwards.
        loader: batches with `input_ids` and `labels` (B, T), perhaps `attention_mask`; B may be 0.
        device: where the model is; None: asks the model.
        autocast: for example `torch.autocast("cpu", torch.bfloat16)`; None: full precision.
        max_batches: stop after so many; None: all.

    Returns:
        The sums over every token that was predicted.
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
            losses, guesses = token_losses(
                hidden.flatten(0, 1), model.token_embedding.weight, targets
            )  # (B, T, C) -> (N, C)
            # Summed on the device: reading a number from a GPU would wait for it every time.
            sums += torch.stack(
                [losses.double().sum(), (targets != IGNORE_INDEX).sum(), (guesses == targets).sum()]
            )
    nats, tokens, correct = sums.tolist()
    return Evaluation(nats, int(tokens), int(correct))


def score_texts(
    model: TransformerLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device | str | None = None,
    batch_size: int = 16,
) -> list[float]:
    """Say how surprised the model is by each whole text, in nats: -log p(text, and then it ends).

    A text is read as it stands in the training data, between end-of-text tokens; the last one is
    predicted too. A text longer than the model's context is read in windows that overlap by half,
    and each token is scored once, with at least half a context before it.

    Args:
        model: evaluated without dropout; its mode is put back afterwards.
        tokenizer: the model's tokenizer.
        texts: any texts, empty ones too.
        device: where the model is; None: asks the model.
        batch_size: windows read at once.

    Returns:
        One total per text, in order. Divide by the number of characters or tokens to compare texts.
    """
    device = device or next(model.parameters()).device
    windows = [
        (number, *window)
        for number, text in enumerate(texts)
        for window in _windows(
            [tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id], model.max_seq_len
        )
    ]
    windows.sort(key=lambda window: len(window[1]))  # like lengths together: little padding
    totals = [0.0] * len(texts)
    with _evaluation_mode(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            # Padding stands on the right, where no token looks: it needs no mask.
            inputs = _pad([inputs for _, inputs, _ in batch], tokenizer.eot_id).to(device)  # (B, T)
            targets = _pad([targets for _, _, targets in batch], IGNORE_INDEX).to(device)  # (B, T)
            hidden = model.hidden_states(inputs).flatten(0, 1)  # (B, T, C) -> (N, C)
            losses, _ = token_losses(hidden, model.token_embedding.weight, targets.flatten())
            nats = losses.double().view(targets.shape).sum(dim=1)  # (N,) -> (B, T) -> (B,)
            for (number, _, _), value in zip(batch, nats.tolist(), strict=True):
                totals[number] += value
    return totals


def _windows(ids: list[int], max_seq_len: int) -> Iterable[tuple[list[int], list[int]]]:
    """Cut ids into (inputs, targets) so that each id but the first is a target exactly once."""
    inputs, targets = ids[:-1], ids[1:]
    end = 0
    while end < len(inputs):
        scored = end
        end = min(len(inputs), end + (max_seq_len if end == 0 else max(1, max_seq_len // 2)))
        start = max(0, end - max_seq_len)
        yield inputs[start:end], [IGNORE_INDEX] * (scored - start) + targets[scored:end]


def _pad(rows: list[list[int]], value: int) -> Tensor:
    """Stack rows of different lengths into (B, T), filled up on the right."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


@contextmanager
def _evaluation_mode(model: nn.Module):
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
