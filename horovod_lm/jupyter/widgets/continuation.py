"""A generated text together with the distribution that each of its tokens was sampled from.

continuation = trace_text(model, tokenizer, "Once upon a time", GenerationConfig(seed=1))
continuation.texts[0]                    # the text that generate_text() returns
continuation.samples[0][3].candidates    # what else the fourth token could have been
"""

from __future__ import annotations

import html
import math
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from horovod_lm.generation.sampling import filtered_probabilities
from horovod_lm.generation.text import continue_prompt
from horovod_lm.jupyter.widgets.visible import visible, visible_token
from horovod_lm.utils.config import GenerationConfig

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM

SECONDS_OF_A_SLICE = 0.05
N_CANDIDATES = 12  # of each token, the most probable ones
FULL_COLOUR = 0.001  # probability from which on a token has the full colour
# Okabe and Ito's orange. Its opacity stays below 1 so that text is readable in both themes.
MAX_OPACITY = 0.6


class Candidate(NamedTuple):
    """A token that could have been sampled: its probability before and after the filters."""

    token_id: int
    before: float
    after: float


class SampledToken(NamedTuple):
    """A generated token and the distribution that it was sampled from.

    Attributes:
        token_id: the token.
        before: its probability according to the model, before any filter.
        after: its probability after temperature, top-k and top-p.
        rank: 1 if no token was more probable.
        n_kept: number of tokens that the filters kept.
        candidates: the most probable tokens, and this one if it is not among them.
    """

    token_id: int
    before: float
    after: float
    rank: int
    n_kept: int
    candidates: tuple[Candidate, ...]


@dataclass(repr=False)
class Continuation:
    """A prompt and its continuations, which grow during generation.

    Attributes:
        prompt: the prompt.
        settings: the settings; the seed is always a number.
        tokenizer: the model's tokenizer.
        samples: the tokens of each continuation, with end-of-text where it was sampled.
        seconds: from the start to the newest token.
        state: `writing`, `done`, or `stopped`.
    """

    prompt: str
    settings: GenerationConfig
    tokenizer: Tokenizer
    samples: list[list[SampledToken]] = field(default_factory=list)
    seconds: float = 0.0
    state: str = "writing"

    @property
    def n_tokens(self) -> int:
        """Number of tokens so far, over all samples."""
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

    def _repr_html_(self) -> str:
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
    """Continue a prompt as `generate_text` does, and keep each token's distribution.

    Raises:
        ConfigError: an invalid setting.
        DataError: a prompt that cannot be encoded.
    """
    *_, continuation = generate_in_slices(model, tokenizer, prompt, settings, device)
    return continuation


def generate_in_slices(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    device: torch.device | str | None = None,
    seconds: float = SECONDS_OF_A_SLICE,
) -> Generator[Continuation, None, None]:
    """Continue a prompt a few tokens at a time, so that an event loop can work in between.

    The tokens are those of `generate_text` with the same settings and seed.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: its tokenizer.
        prompt: any text.
        settings: the settings; without a seed, a new one is chosen.
        device: as for `generate_text`.
        seconds: approximate length of a slice; the first one is one token long.

    Yields:
        The same growing `Continuation` after each slice; at the end its state is `done`.
    """
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": new_seed()})
    continuation = Continuation(prompt, settings, tokenizer)
    continuation.samples = [[] for _ in range(settings.num_samples)]
    logits: list[Tensor] = []  # (B, V) of each step of this slice
    tokens: list[Tensor] = []  # (B,)
    steps = continue_prompt(model, tokenizer, prompt, settings, device, on_logits=logits.append)
    started = slice_started = time.perf_counter()
    with closing(steps):
        for step_tokens in steps:
            tokens.append(step_tokens)
            if not continuation.n_tokens or time.perf_counter() - slice_started > seconds:
                _append(continuation, logits, tokens)
                continuation.seconds = time.perf_counter() - started
                yield continuation
                slice_started = time.perf_counter()
        _append(continuation, logits, tokens)
        continuation.seconds = time.perf_counter() - started
    continuation.state = "done"
    yield continuation


def new_seed() -> int:
    """Return a random seed that is short enough to type."""
    return secrets.randbelow(1_000_000)


def _append(continuation: Continuation, logits: list[Tensor], tokens: list[Tensor]) -> None:
    """Append the steps of a slice to the samples, and clear both lists.

    The distributions are computed here: the logits of a long text, V floats for each token, would
    not fit into memory.
    """
    if not tokens:
        return
    slice_logits, slice_tokens = torch.stack(logits, dim=1), torch.stack(tokens, dim=1)
    logits.clear()
    tokens.clear()
    end = continuation.tokenizer.eot_id
    for sample, sample_logits, sample_tokens in zip(
        continuation.samples, slice_logits, slice_tokens, strict=True
    ):  # (N, V), (N,)
        if sample and sample[-1].token_id == end:
            continue  # what follows end-of-text is padding
        ends = (sample_tokens == end).nonzero()
        n_new = int(ends[0]) + 1 if len(ends) else len(sample_tokens)
        sample += sampled_tokens(
            sample_logits[:n_new], sample_tokens[:n_new], continuation.settings
        )


@torch.inference_mode()
def sampled_tokens(
    logits: Tensor, token_ids: Tensor, settings: GenerationConfig
) -> list[SampledToken]:
    """Return tokens together with the distributions that they were sampled from.

    Args:
        logits: (N, V), as the model returned them.
        token_ids: (N,) the token that was sampled from each row.
        settings: temperature, top-k and top-p.
    """
    before, after = logits.float().softmax(dim=-1), filtered_probabilities(logits.float(), settings)
    own = token_ids.to(logits.device)[:, None]  # (N, 1)
    ranks = 1 + (before > before.gather(-1, own)).sum(dim=-1)  # (N,)
    best = before.topk(min(N_CANDIDATES, before.shape[-1]), dim=-1).indices
    shown = torch.cat([best, own], dim=-1)  # (N, N_CANDIDATES + 1)
    columns = (shown, before.gather(-1, shown), after.gather(-1, shown))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    n_kept = (after > 0).sum(dim=-1).tolist()
    found = []
    for columns_of_row, rank, kept in zip(rows, ranks.tolist(), n_kept, strict=True):
        *others, one = map(Candidate, *columns_of_row)
        candidates = others if one in others else [*others, one]
        found.append(
            SampledToken(one.token_id, one.before, one.after, rank, kept, tuple(candidates))
        )
    return found


# ---- as HTML that needs no kernel ---------------------------------------------------------------


def colour_of(probability: float) -> str:
    """Return the background of a token as CSS: the less probable, the stronger.

    The opacity grows by the same amount for each power of ten, down to `FULL_COLOUR`.
    """
    share = math.log(max(probability, FULL_COLOUR)) / math.log(FULL_COLOUR)
    return f"rgba(230, 159, 0, {MAX_OPACITY * abs(share):.3f})"


def coloured_text(continuation: Continuation) -> str:
    """Return a continuation with each token coloured by its probability."""
    prompt = html.escape(visible(continuation.prompt))
    style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7"
    rows = "".join(
        f"<div style='{style}'><bdi style='opacity: 0.7'>{prompt}</bdi>"
        + "".join(
            f"<bdi title='probability {token.before:.4g}' style='background:"
            f" {colour_of(token.before)}'>"
            f"{html.escape(visible_token(continuation.tokenizer, token.token_id))}</bdi>"
            for token in sample
        )
        + "</div>"
        for sample in continuation.samples
    )
    return f"<div role='group' aria-label='generated text'>{rows}</div>"


def describe_settings(settings: GenerationConfig) -> str:
    """Return the settings of a text in one line."""
    return (
        f"temperature {settings.temperature:g}, top-k {settings.top_k or 'all'}, "
        f"top-p {settings.top_p:g}, seed {settings.seed}, {settings.max_new_tokens} tokens"
        + (f", {settings.num_samples} samples" if settings.num_samples > 1 else "")
    )


def distribution_table(tokenizer: Tokenizer, token: SampledToken) -> str:
    """Return the distribution that a token was sampled from, before and after the filters."""

    def name_of(token_id: int) -> str:
        return html.escape(visible_token(tokenizer, token_id).replace("\n", ""))

    largest = max(max(one.before, one.after) for one in token.candidates)
    rows = "".join(
        "<tr"
        + (" aria-current='true' style='font-weight: bold; outline: 2px solid'"
           if one.token_id == token.token_id else "")
        + f"><td><bdi style='white-space: pre'>{name_of(one.token_id)}</bdi></td>"
        f"{_bar(one.before, largest)}{_bar(one.after, largest)}</tr>"
        for one in token.candidates
    )  # fmt: skip
    rest_before = max(0.0, 1 - sum(one.before for one in token.candidates))
    rest_after = max(0.0, 1 - sum(one.after for one in token.candidates))
    rest = f"<td><i>all others</i></td>{_bar(rest_before, largest)}{_bar(rest_after, largest)}"
    head = "".join(
        f"<th scope='col' style='text-align: left'>{name}</th>"
        for name in ("token", "model", "after the filters")
    )
    return (
        f"<p><b>“<bdi>{name_of(token.token_id)}</bdi>”</b>: rank {token.rank}; probability"
        f" {token.before:.4f} by the model, {token.after:.4f} after the filters, which kept"
        f" {token.n_kept:,} token{'s' if token.n_kept != 1 else ''}</p>"
        "<table aria-label='distribution that the token was sampled from'>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}<tr>{rest}</tr></tbody></table>"
    )


def _bar(probability: float, largest: float) -> str:
    """Return a table cell with a probability as a number and as a bar."""
    width = 120 * min(1.0, probability / largest)
    return (
        "<td style='min-width: 14em'><div style='display: flex; align-items: center; gap: 0.5em'>"
        f"<span style='width: 4.5em; text-align: right'>{probability:.4f}</span>"
        f"<span style='width: {width:.1f}px; height: 0.8em; background: #0072B2'></span>"
        "</div></td>"
    )


def side_by_side(continuations: Sequence[Continuation], names: Sequence[str]) -> str:
    """Return continuations in columns, each below its name and its settings."""
    cells = "".join(
        f"<section aria-label='{html.escape(name, quote=True)}' style='flex: 1 1 16em;"
        " min-width: 0; border: 1px solid var(--jp-border-color2, #999); padding: 0.5em'>"
        f"<b>{html.escape(name)}</b><br>{html.escape(describe_settings(one.settings))}"
        f"<hr>{coloured_text(one)}</section>"
        for one, name in zip(continuations, names, strict=True)
    )
    return f"<div style='display: flex; flex-wrap: wrap; gap: 0.5em'>{cells}</div>"
