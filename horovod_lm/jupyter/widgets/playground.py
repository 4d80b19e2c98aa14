"""A widget to generate text: a prompt, the settings, and the distribution behind each token.

model, tokenizer, config = load_model_for_generation("runs/my_run")
Playground(model, tokenizer, config)

continuation = trace_text(model, tokenizer, "Once upon a time", GenerationConfig(seed=1))
continuation.text                    # the text that generate_text() returns
continuation.tokens[3].candidates    # what else the fourth token could have been
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
from horovod_lm.utils.distributed import choose_device
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
    """A prompt and its continuation, which grows during generation."""

    prompt: str
    settings: GenerationConfig
    tokenizer: Tokenizer
    tokens: list[SampledToken] = field(default_factory=list)  # end-of-text where it was sampled
    seconds: float = 0.0  # from the start to the newest token

    @property
    def text(self) -> str:
        """The prompt with its continuation: what `generate_text` returns for these settings."""
        end = self.tokenizer.eot_id
        ids = [one.token_id for one in self.tokens if one.token_id != end]
        return self.prompt + self.tokenizer.decode(ids)

    def shown_tokens(self) -> list[tuple[str, str, str]]:
        """Return each token as visible text, its probability, and its colour in CSS."""
        return [
            (visible_token(self.tokenizer, id_), f"{before:.4g}", colour_of(before))
            for id_, before, *_ in self.tokens
        ]

    def _repr_html_(self) -> str:
        """Return the prompt and each token, coloured by its probability."""
        style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7"
        parts = [f"<bdi style='opacity: 0.7'>{html.escape(visible(self.prompt))}</bdi>"]
        for text, probability, colour in self.shown_tokens():
            look = f"title='probability {probability}' style='background: {colour}'"
            parts.append(f"<bdi {look}>{html.escape(text)}</bdi>")
        body = f"<div style='{style}'>{''.join(parts)}</div>"
        return f"<div role='group' aria-label='generated text'>{body}</div>"

    def __repr__(self) -> str:
        return self.text


def trace_text(
    model: TransformerLM, tokenizer: Tokenizer, prompt: str, settings: GenerationConfig
) -> Continuation:
    """Continue a prompt once, as `generate_text` does, and keep each token's distribution.

    Raises:
        ConfigError: an invalid setting.
        DataError: a prompt that cannot be encoded.
    """
    *_, continuation = generate_in_slices(model, tokenizer, prompt, settings)
    return continuation


def generate_in_slices(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    seconds: float = SECONDS_OF_A_SLICE,
) -> Generator[Continuation, None, None]:
    """Continue a prompt a few tokens at a time, so that an event loop can work in between.

    The tokens are those of `generate_text` with the same settings and seed. Yields the same growing
    `Continuation` after each slice; a slice takes about `seconds`, the first one is one token long.
    """
    settings = settings.model_copy(update={"num_samples": 1})
    continuation = Continuation(prompt, settings, tokenizer)
    logits: list[Tensor] = []  # (1, V) of each step of this slice
    tokens: list[Tensor] = []  # (1,)
    started = slice_started = time.perf_counter()

    def end_slice() -> Continuation:
        # The distributions are computed here: the logits of a long text, V floats for each token,
        # would not fit into memory.
        if tokens:
            continuation.tokens += sampled_tokens(torch.cat(logits), torch.cat(tokens), settings)
            continuation.seconds = time.perf_counter() - started
        logits.clear()
        tokens.clear()
        return continuation

    steps = continue_prompt(model, tokenizer, prompt, settings, on_logits=logits.append)
    with closing(steps):
        for step_tokens in steps:
            tokens.append(step_tokens)
            if not continuation.tokens or time.perf_counter() - slice_started > seconds:
                yield end_slice()
                slice_started = time.perf_counter()
    yield end_slice()


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
    """The tokens of a continuation; a click on one sends its place."""

    _esm = frontend("tokens.js")
    _css = frontend("tokens.css")
    prompt = traitlets.Unicode("").tag(sync=True)
    tokens: traitlets.List[Any] = traitlets.List(help="of `shown_tokens`").tag(sync=True)
    selected = traitlets.Int(-1, help="the place of a token; -1: none").tag(sync=True)
    legend = traitlets.List([[name, colour_of(one)] for name, one in LEGEND.items()]).tag(sync=True)


class Playground(BaseWidget):
    """Prompt, settings, streamed text, and the distribution behind each token.

    The text is generated by a task of the kernel's event loop, a few tokens at a time, so that
    other cells and the Stop button work meanwhile. The same seed and settings give the text that
    `generate_text` returns.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        config: its `generation` section gives the initial settings.

    Attributes:
        continuation: the `Continuation` that is shown; None: none yet.
    """

    def __init__(self, model: TransformerLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self.continuation: Continuation | None = None
        self._make_inputs(config.generation)
        self.generate = self.button("Generate", "play", "continue the prompt", self.start)
        self.stop_button = self.button("Stop", "stop", "end the text here", self.stop)
        self.stop_button.disabled = True
        self.view = TokenView()
        self.view.on_msg(self.guarded(lambda _, place, buffers: self.select(place)))
        self.detail = widgets.HTML(HINT)
        self.children = [
            self.prompt,
            row(self.temperature, self.top_k, self.top_p),
            row(self.tokens, self.seed, self.new_seed),
            row(self.generate, self.stop_button),
            self.message, self.view, self.detail,
        ]  # fmt: skip

    def start(self) -> None:
        """Start to generate with the current values of the inputs."""
        if self.is_busy:
            return
        prompt, settings = self.prompt.value, self.settings()
        self.generate.disabled, self.stop_button.disabled = True, False
        self.continuation = None
        with self.view.hold_sync():
            self.view.prompt, self.view.tokens, self.view.selected = visible(prompt), [], -1
        self.detail.value = HINT
        self.say("writing")
        self.start_task(lambda: self._write(prompt, settings))

    def stop(self) -> None:
        """End the text after the current slice."""
        self.stop_button.disabled = True

    def select(self, place: int) -> None:
        """Show the distribution of a token."""
        if self.continuation is not None:
            token = self.continuation.tokens[place]
            self.view.selected = place
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
            self.seed.value = str(secrets.randbelow(1_000_000))  # short enough to type
        try:
            seed = int(self.seed.value)
        except ValueError:
            raise ConfigError(f"the seed must be a whole number, not {self.seed.value!r}") from None
        return GenerationConfig(
            max_new_tokens=self.tokens.value, temperature=self.temperature.value,
            top_k=self.top_k.value, top_p=self.top_p.value, seed=seed,
        )  # fmt: skip

    async def _write(self, prompt: str, settings: GenerationConfig) -> None:
        """Generate a text, and return to the event loop after every few tokens."""
        end, notes, due = "stopped", [], 0.0
        slices = generate_in_slices(self._model, self._tokenizer, prompt, settings)
        try:
            with closing(slices):
                while not self.stop_button.disabled:
                    # A warning would be printed where nobody sees it.
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        following = next(slices, None)
                    notes += [str(one.message) for one in caught]
                    if following is None:
                        end = "done"
                        break
                    self.continuation = following
                    started = time.perf_counter()
                    if started > due:
                        self.view.tokens = following.shown_tokens()
                        took = time.perf_counter() - started
                        due = started + max(UPDATE_INTERVAL, UPDATE_SHARE * took)
                    await asyncio.sleep(0)
        finally:
            self.generate.disabled, self.stop_button.disabled = False, True
            if written := self.continuation:
                self.view.tokens = written.shown_tokens()
                rate = len(written.tokens) / max(written.seconds, 1e-9)
                words = f"{end}: {len(written.tokens)} tokens, {rate:,.0f} per second"
                self.say("; ".join([words, *notes]))

    def _make_inputs(self, now: GenerationConfig) -> None:
        number, slider = widgets.BoundedIntText, widgets.FloatSlider
        self.prompt = labelled(widgets.Textarea, "Prompt", "auto", value="Once upon a time", rows=3)
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

    if device is not None:
        model.to(choose_device(device))
    display(Playground(model, tokenizer, config))
    line = "Nothing to click above? It needs a kernel: run this cell. In a terminal, the same call"
    display({"text/plain": f"{line} asks for one prompt after another."}, raw=True)
