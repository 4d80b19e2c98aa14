"""A widget to generate text: a prompt, the settings, and the distribution behind each token.

model, tokenizer, config = load_model_for_generation("runs/my_run")
Playground(model, tokenizer, config)

continuation = trace_text(model, tokenizer, "Once upon a time", GenerationConfig(seed=1))
continuation.texts[0]                    # the text that generate_text() returns
continuation.samples[0][3].candidates    # what else the fourth token could have been
"""

from __future__ import annotations

import asyncio
import html
import math
import secrets
import time
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from torch import Tensor

from horovod_lm.generation.sampling import filtered_probabilities
from horovod_lm.generation.text import continue_prompt
from horovod_lm.jupyter.widgets.widget_parts import (
    BaseWidget,
    frontend,
    labelled,
    row,
    visible,
    visible_token,
)
from horovod_lm.utils.config import Config, GenerationConfig
from horovod_lm.utils.errors import ConfigError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM

SECONDS_OF_A_SLICE = 0.05
N_CANDIDATES = 12  # of each token, the most probable ones
FULL_COLOUR = 0.001  # probability from which on a token has the full colour
# Okabe and Ito's orange. Its opacity stays below 1 so that text is readable in both themes.
MAX_OPACITY = 0.6
UPDATE_INTERVAL = 0.1  # seconds; the browser needs time to draw, too
UPDATE_SHARE = 20  # updates of a long text take at most 1 part in so many of the time
HINT = "Click a token, or move to it with the arrow keys, to see its distribution."
LEGEND = {"1": 1.0, "0.1": 0.1, "0.01": 0.01, "0.001 or less": 0.001}


class Candidate(NamedTuple):
    """A token that could have been sampled: its probability before and after the filters."""

    token_id: int
    before: float
    after: float


class SampledToken(NamedTuple):
    """A generated token and the distribution that it was sampled from."""

    token_id: int
    before: float  # its probability according to the model
    after: float  # its probability after temperature, top-k and top-p
    rank: int  # 1 if no token was more probable
    n_kept: int  # number of tokens that the filters kept
    candidates: tuple[Candidate, ...]  # the most probable tokens, and this one in any case


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
        end, decode = self.tokenizer.eot_id, self.tokenizer.decode
        ids = [[one.token_id for one in sample if one.token_id != end] for sample in self.samples]
        return [self.prompt + decode(sample) for sample in ids]

    def shown_tokens(self) -> list[list[tuple[str, str, str]]]:
        """Return each token of each sample: visible text, probability, and colour in CSS."""
        return [
            [
                (visible_token(self.tokenizer, id_), f"{before:.4g}", colour_of(before))
                for id_, before, *_ in sample
            ]
            for sample in self.samples
        ]

    def _repr_html_(self) -> str:
        """Return the prompt and each token, coloured by its probability."""
        prompt = html.escape(visible(self.prompt))
        style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7"
        lines = []
        for sample in self.shown_tokens():
            lines.append(f"<div style='{style}'><bdi style='opacity: 0.7'>{prompt}</bdi>")
            for text, probability, colour in sample:
                look = f"title='probability {probability}' style='background: {colour}'"
                lines.append(f"<bdi {look}>{html.escape(text)}</bdi>")
            lines.append("</div>")
        return f"<div role='group' aria-label='generated text'>{''.join(lines)}</div>"

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
    samples: list[list[SampledToken]] = [[] for _ in range(settings.num_samples)]
    continuation = Continuation(prompt, settings, tokenizer, samples)
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
    end, samples = continuation.tokenizer.eot_id, continuation.samples
    for sample, row_logits, row_tokens in zip(samples, slice_logits, slice_tokens, strict=True):
        if sample and sample[-1].token_id == end:
            continue  # what follows end-of-text is padding
        ends = (row_tokens == end).nonzero()
        n = int(ends[0]) + 1 if len(ends) else len(row_tokens)
        sample += sampled_tokens(row_logits[:n], row_tokens[:n], continuation.settings)


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
        found.append(SampledToken(*one, rank, kept, tuple(candidates)))
    return found


# ---- as HTML that needs no kernel ----------------------------------------------------------------


def colour_of(probability: float) -> str:
    """Return the background of a token as CSS: the less probable, the stronger.

    The opacity grows by the same amount for each power of ten, down to `FULL_COLOUR`.
    """
    share = math.log(max(probability, FULL_COLOUR)) / math.log(FULL_COLOUR)
    return f"rgba(230, 159, 0, {MAX_OPACITY * abs(share):.3f})"


def distribution_table(tokenizer: Tokenizer, token: SampledToken) -> str:
    """Return the distribution that a token was sampled from, before and after the filters."""

    def name_of(token_id: int) -> str:
        return html.escape(visible_token(tokenizer, token_id).replace("\n", ""))

    def line(name: str, before: float, after: float, style: str = "") -> str:
        return f"<tr{style}><td>{name}</td>{_bar(before, largest)}{_bar(after, largest)}</tr>"

    chosen = " aria-current='true' style='font-weight: bold; outline: 2px solid'"
    largest = max(max(one.before, one.after) for one in token.candidates)
    lines = [
        line(
            f"<bdi style='white-space: pre'>{name_of(one.token_id)}</bdi>", one.before, one.after,
            chosen if one.token_id == token.token_id else "",
        )
        for one in token.candidates
    ]  # fmt: skip
    before = 1 - sum(one.before for one in token.candidates)
    after = 1 - sum(one.after for one in token.candidates)
    lines.append(line("<i>all others</i>", max(0.0, before), max(0.0, after)))
    names = ("token", "model", "after the filters")
    head = "".join(f"<th scope='col' style='text-align: left'>{name}</th>" for name in names)
    return (
        f"<p><b>“<bdi>{name_of(token.token_id)}</bdi>”</b>: rank {token.rank}; probability"
        f" {token.before:.4f} by the model, {token.after:.4f} after the filters, which kept"
        f" {token.n_kept:,} token{'s' if token.n_kept != 1 else ''}</p>"
        "<table aria-label='distribution that the token was sampled from'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
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


# ---- the widget ----------------------------------------------------------------------------------


class TokenView(anywidget.AnyWidget):
    """The tokens of a continuation; it sends [sample, index] of a click, "opened" and "closed"."""

    _esm = frontend("tokens.js")
    _css = frontend("tokens.css")
    number = traitlets.Int(0, help="changes with each new continuation").tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    samples: traitlets.List[Any] = traitlets.List(help="of `shown_tokens`").tag(sync=True)
    selected: traitlets.List[Any] = traitlets.List(help="[sample, index], or empty").tag(sync=True)
    legend = traitlets.List([[name, colour_of(one)] for name, one in LEGEND.items()]).tag(sync=True)

    def show(self, continuation: Continuation, is_new: bool) -> None:
        """Show the current state of a continuation."""
        with self.hold_sync():
            if is_new:
                self.number, self.selected = self.number + 1, []
                self.prompt = visible(continuation.prompt)
            self.samples = continuation.shown_tokens()


class Playground(BaseWidget):
    """Prompt, settings, streamed text, and the distribution behind each token.

    The text is generated by a task of the kernel's event loop, a few tokens at a time, so that
    other cells and the Stop button work meanwhile. The same seed and settings give the text that
    `generate_text` returns.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: its tokenizer.
        config: its `generation` section gives the initial settings.
        device: as for `generate_text`.
        prompt: the initial prompt.

    Attributes:
        continuation: the `Continuation` that is shown; None: none yet.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        config: Config,
        device: torch.device | str | None = None,
        prompt: str = "Once upon a time",
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self.continuation: Continuation | None = None
        self._make_inputs(config.generation, prompt)
        self.generate = self.button("Generate", "play", "continue the prompt", self.start)
        self.stop_button = self.button("Stop", "stop", "end the text here", self.cancel_task)
        self.stop_button.disabled = True
        self.view = TokenView()
        self.view.on_msg(self.guarded(lambda _, message, buffers: self._receive(message)))
        self._open_views = 0
        self.detail = widgets.HTML(HINT)
        self.children = [
            self.prompt,
            row(self.temperature, self.top_k, self.top_p),
            row(self.tokens, self.samples, self.seed, self.new_seed),
            row(self.generate, self.stop_button),
            self.message, self.view, self.detail,
        ]  # fmt: skip

    def start(self) -> None:
        """Start to generate with the current values of the inputs."""
        if self.is_busy:
            return
        prompt, settings = self.prompt.value, self.settings()
        self._set_writing(True)
        self.detail.value = HINT
        self.say("writing")
        self.start_task(self._write, prompt, settings, at_end=lambda: self._set_writing(False))

    def select(self, sample: int, index: int) -> None:
        """Show the distribution of a token."""
        if self.continuation is not None:
            token = self.continuation.samples[sample][index]
            self.view.selected = [sample, index]
            self.detail.value = distribution_table(self._tokenizer, token)

    def __repr__(self) -> str:
        """Describe the widget for pages without a kernel."""
        return f"playground: a model of {self._model.num_parameters():,} parameters"

    def settings(self) -> GenerationConfig:
        """Return the settings of the inputs, with a new seed if the box is checked.

        Raises:
            ConfigError: the seed is not a whole number.
        """
        if self.new_seed.value:
            self.seed.value = str(new_seed())
        try:
            seed = int(self.seed.value)
        except ValueError:
            raise ConfigError(f"the seed must be a whole number, not {self.seed.value!r}") from None
        return GenerationConfig(
            max_new_tokens=self.tokens.value, temperature=self.temperature.value,
            top_k=self.top_k.value, top_p=self.top_p.value, num_samples=self.samples.value,
            seed=seed,
        )  # fmt: skip

    def _receive(self, message: str | list[int]) -> None:
        """Select a token, or stop when the last view has closed, and with it the Stop button."""
        if isinstance(message, list):
            self.select(*message)
        else:
            self._open_views += {"opened": 1, "closed": -1}[message]
            if not self._open_views:
                self.cancel_task()

    async def _write(self, prompt: str, settings: GenerationConfig) -> None:
        """Generate a text, and return to the event loop after every few tokens."""
        continuation, notes, due = None, [], 0.0
        slices = generate_in_slices(self._model, self._tokenizer, prompt, settings, self._device)
        try:
            with closing(slices):
                while True:
                    # A warning would be printed where nobody sees it.
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        following = next(slices, None)
                    notes += [str(one.message) for one in caught]
                    if following is None:
                        break
                    is_new = continuation is None
                    self.continuation = continuation = following
                    started = time.perf_counter()
                    if started > due:
                        self.view.show(continuation, is_new)
                        took = time.perf_counter() - started
                        due = started + max(UPDATE_INTERVAL, UPDATE_SHARE * took)
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            if continuation is not None:
                continuation.state = "stopped"
        finally:
            if continuation is not None:
                self._finish(continuation, notes)

    def _finish(self, continuation: Continuation, notes: list[str]) -> None:
        self.view.show(continuation, is_new=False)
        rate = continuation.n_tokens / max(continuation.seconds, 1e-9)
        words = f"{continuation.state}: {continuation.n_tokens} tokens, {rate:,.0f} per second"
        self.say("; ".join([words, *notes]))

    def _set_writing(self, writing: bool) -> None:
        self.generate.disabled, self.stop_button.disabled = writing, not writing

    def _make_inputs(self, now: GenerationConfig, prompt: str) -> None:
        number, slider = widgets.BoundedIntText, widgets.FloatSlider
        self.prompt = labelled(widgets.Textarea, "Prompt", "auto", value=prompt, rows=3)
        self.temperature = labelled(
            slider, "Temperature", "26em", min=0, max=max(3, now.temperature), step=0.05,
            value=now.temperature,
        )  # fmt: skip
        self.top_p = labelled(
            slider, "Top-p (1: all)", "24em", min=0.01, max=1, step=0.01, value=now.top_p
        )
        self.top_k = labelled(number, "Top-k (0: all)", "13em", min=0, max=10**6, value=now.top_k)
        self.tokens = labelled(
            number, "Tokens", "10em", min=1, max=100_000, value=now.max_new_tokens
        )
        self.samples = labelled(number, "Samples", "9em", min=1, max=16, value=now.num_samples)
        # Text: any whole number is a seed, and a browser's number input ends at 2^53.
        self.seed = labelled(widgets.Text, "Seed", "14em", value=str(now.seed or 0))
        self.new_seed = widgets.Checkbox(
            value=now.seed is None, description="a new seed each time", indent=False,
            layout={"width": "auto"},
        )  # fmt: skip


def show_playground(
    model: TransformerLM,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device | str | None = None,
) -> None:
    """Display a playground, and below it a line for readers without a kernel."""
    from IPython.display import display

    display(Playground(model, tokenizer, config, device))
    line = "Nothing to click above? It needs a kernel: run this cell. In a terminal, the same call"
    display({"text/plain": f"{line} asks for one prompt after another."}, raw=True)
