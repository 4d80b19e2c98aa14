"""A text that a model continues, with the distribution that each of its tokens was drawn from.

continuation = trace_text(model, tokenizer, "Once upon a time", GenerationConfig(seed=1))
continuation.texts[0]                     # what generate_text() gives
continuation.samples[0][3].distribution   # what else the fourth token might have been
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horovod_lm.jupyter.drawn_token import DrawnToken, work_out
from horovod_lm.text import continue_prompt
from horovod_lm.utils.config import GenerationConfig

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM

TOKENS_AT_ONCE = 32  # whose distributions are worked out together
SECONDS_OF_A_SLICE = 0.05


@dataclass(repr=False)
class Continuation:
    """A prompt and how it goes on; it grows while the model writes.

    Attributes:
        prompt: the beginning.
        settings: how it is continued; the seed is a number.
        samples: the tokens of each continuation, with end-of-text where it ended by itself.
        seconds: from the start to the newest token.
        state: `writing`, `done`, or `stopped`.
    """

    prompt: str
    settings: GenerationConfig
    tokenizer: Tokenizer
    samples: list[list[DrawnToken]] = field(default_factory=list)
    seconds: float = 0.0
    state: str = "writing"

    @property
    def n_tokens(self) -> int:
        """Tokens drawn so far, over all samples."""
        return sum(map(len, self.samples))

    @property
    def texts(self) -> list[str]:
        """The prompt with each continuation: what `generate_text` returns for these settings."""
        end = self.tokenizer.eot_id
        return [
            self.prompt
            + self.tokenizer.decode(token.token_id for token in sample if token.token_id != end)
            for sample in self.samples
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved of it: plain values."""
        return {
            "prompt": self.prompt,
            "settings": self.settings.model_dump(),
            "state": self.state,
            "texts": self.texts,
            "tokens": [
                [
                    {"id": one.token_id, "before": one.before, "after": one.distribution.after}
                    for one in sample
                ]
                for sample in self.samples
            ],
        }

    def _repr_html_(self) -> str:
        from horovod_lm.jupyter.continuation_html import coloured_text

        return coloured_text(self)

    def __repr__(self) -> str:
        return "\n\n".join(self.texts)


def trace_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    device: torch.device | str | None = None,
) -> Continuation:
    """Continue a prompt as `generate_text` does, and keep what each token was drawn from.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a prompt that cannot be encoded.
    """
    *_, continuation = write_in_slices(model, tokenizer, prompt, settings, device)
    return continuation


def write_in_slices(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    device: torch.device | str | None = None,
    seconds: float = SECONDS_OF_A_SLICE,
) -> Iterator[Continuation]:
    """Continue a prompt, a few tokens at a time, so that others can work in between.

    The same tokens in the same order as `generate_text` with the same settings and seed.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: its tokenizer.
        prompt: any text.
        settings: how to draw; without a seed a new one is chosen, and is in what is yielded.
        device: as for `generate_text`.
        seconds: about how long a slice lasts; the first is one token long, to be seen at once.

    Yields:
        The same growing `Continuation` after each slice; it is `done` at the last.
    """
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": new_seed()})
    continuation = Continuation(prompt, settings, tokenizer)
    continuation.samples = [[] for _ in range(settings.num_samples)]
    seen: list[Tensor] = []  # logits (B, V) of each step of this slice
    steps = continue_prompt(model, tokenizer, prompt, settings, device, on_logits=seen.append)
    drawn: list[Tensor] = []
    pause = _Pause(seconds)
    began = time.perf_counter()
    with closing(steps):
        for tokens in steps:
            drawn.append(tokens)
            if not continuation.n_tokens or pause.is_due():
                _take(continuation, seen, drawn)
                continuation.seconds = time.perf_counter() - began
                yield continuation
                pause.over()
        _take(continuation, seen, drawn)
        continuation.seconds = time.perf_counter() - began
    yield continuation
    pause.over()
    tokens = itertools.chain(*continuation.samples)
    while some := list(itertools.islice(tokens, TOKENS_AT_ONCE)):
        work_out(some)
        if pause.is_due():
            yield continuation
            pause.over()
    continuation.state = "done"
    yield continuation


class _Pause:
    """Says when others should have their turn."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.over()

    def over(self) -> None:
        self.since = time.perf_counter()

    def is_due(self) -> bool:
        return time.perf_counter() - self.since > self.seconds


def new_seed() -> int:
    """Choose a seed that nobody asked for, short enough to be typed again."""
    return secrets.randbelow(1_000_000)


def _take(continuation: Continuation, seen: list[Tensor], drawn: list[Tensor]) -> None:
    """Move a slice's steps into the continuation, and empty both lists."""
    if not drawn:
        return
    logits, tokens = torch.stack(seen, dim=1), torch.stack(drawn, dim=1)  # (B, N, V), (B, N)
    seen.clear()
    drawn.clear()
    end, how = continuation.tokenizer.eot_id, continuation.settings
    for sample, row_logits, row_tokens in zip(
        continuation.samples, logits, tokens.cpu(), strict=True
    ):
        if sample and sample[-1].token_id == end:
            continue  # it has ended: what is drawn after that is filler
        ends = (row_tokens == end).nonzero()
        n_new = int(ends[0]) + 1 if len(ends) else len(row_tokens)
        before = row_logits[:n_new].float().softmax(dim=-1)  # (n_new, V)
        own = before.gather(-1, row_tokens[:n_new, None].to(before.device))[:, 0].tolist()
        sample += [
            DrawnToken(token, probability, token_logits, how, continuation.tokenizer)
            for token, probability, token_logits in zip(
                row_tokens.tolist(), own, row_logits[:n_new], strict=False
            )
        ]


def save_continuations(path: str | Path, continuations: list[Continuation]) -> Path:
    """Add continuations to a file, a line of JSON for each, and return its path."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one.to_dict(), ensure_ascii=True) + "\n" for one in continuations]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))
    return path
