"""A trained model, played with: a prompt, the settings, and what each token was drawn from.

model, tokenizer, config = load_model_for_generation("runs/my_run")
Playground(model, tokenizer, config)
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import ipywidgets as widgets
import torch

from horovod_lm.jupyter.continuation import (
    Continuation,
    new_seed,
    save_continuations,
    write_in_slices,
)
from horovod_lm.jupyter.continuation_html import (
    distribution_table,
    settings_in_words,
    side_by_side,
)
from horovod_lm.jupyter.token_view import TokenView
from horovod_lm.jupyter.visible import visible
from horovod_lm.jupyter.widget_parts import WRAPPED, Message, button, labelled
from horovod_lm.utils.config import Config, GenerationConfig
from horovod_lm.utils.errors import ConfigError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM

LONGEST_HISTORY = 50
# The browser, too, needs time to draw: ten times a second looks like a stream.
SECONDS_BETWEEN_SHOWINGS = 0.1
SHOWING_SHARE = 20  # and showing a very long text may cost one part in so many of the time
NAME_OF_FILE = "continuations.jsonl"
HINT = "Click a token, or step to it with the arrow keys, to see what it was drawn from."


class Playground(widgets.VBox):
    """Prompts, settings, streamed text, and the distribution behind every token.

    The text is written by a task of the kernel's event loop, a few tokens at a time, so that other
    cells and the Stop button have their turn. The same seed and settings write what
    `generate_text` returns.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: its tokenizer.
        config: its `generation` section gives the settings to begin with.
        device: as for `generate_text`.
        prompt: the text to begin with.

    Attributes:
        history: every `Continuation` of this playground, oldest first.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        config: Config,
        device: torch.device | str | None = None,
        prompt: str = "Once upon a time",
    ) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self.history: list[Continuation] = []
        self._shown: Continuation | None = None
        self._number = 0
        self._task: asyncio.Task[None] | None = None
        self.message = Message()
        self._make_inputs(config.generation, prompt)
        self._make_buttons()
        self.view = TokenView(on_select=self.message.guarded(self.select), on_closed=self.stop)
        self.detail = widgets.HTML(HINT)
        self.past = labelled(
            widgets.SelectMultiple, "History (several: side by side)", layout={"width": "auto"}
        )
        self.past.observe(self.message.guarded(self._compare), "value")
        self.comparison = widgets.HTML()
        super().__init__(self._rows())

    # ---- what the buttons do ------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write with the values that the inputs have now."""
        if self.is_writing:
            return
        prompt, settings = self.prompt.value, self.settings()
        self._set_working(True)
        self.detail.value = HINT
        self.message.say("writing")
        self._task = asyncio.ensure_future(self.message.guard(self._write(prompt, settings)))

    def stop(self) -> None:
        """End the text that is being written; what is there stays."""
        if self._task is not None and self.is_writing:
            self._task.cancel()

    def select(self, sample: int, index: int) -> None:
        """Show what a token was drawn from."""
        if self._shown is None:
            return
        token = self._shown.samples[sample][index]
        self.view.selected = [sample, index]
        self.detail.value = distribution_table(token)

    def step(self, by: int) -> None:
        """Go to the next token, or to the one before, of the sample that was last looked at."""
        if self._shown is None or not self._shown.n_tokens:
            return
        sample, index = self.view.selected or [0, -1 if by > 0 else 0]
        last = len(self._shown.samples[sample]) - 1
        self.select(sample, max(0, min(last, index + by)))

    def save(self) -> None:
        """Add what is chosen in the history, or else what is shown, to the file."""
        chosen = [self.history[place] for place in self.past.value] or self.history[-1:]
        if not chosen:
            raise ConfigError("there is nothing to save yet: generate a text first")
        path = save_continuations(self.file.value.strip() or NAME_OF_FILE, chosen)
        self.message.say(f"saved {len(chosen)} to {path}")

    def __repr__(self) -> str:
        """Say what it is: what readers of a stored page see, who have no kernel."""
        return f"playground: a model of {self._model.num_parameters():,} parameters to play with"

    def close(self) -> None:
        """Stop writing and take the widget away."""
        self.stop()
        super().close()

    @property
    def is_writing(self) -> bool:
        """Whether a text is being written now."""
        return self._task is not None and not self._task.done()

    def settings(self) -> GenerationConfig:
        """Return the settings that the inputs say; without a fixed seed a new one, which is shown.

        Raises:
            ConfigError: a seed that is no whole number.
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

    # ---- inside ---------------------------------------------------------------------------------

    async def _write(self, prompt: str, settings: GenerationConfig) -> None:
        """Write a text, and let the event loop have its turn after every few tokens."""
        continuation, notes = None, []
        self._number += 1
        slices = write_in_slices(self._model, self._tokenizer, prompt, settings, self._device)
        try:
            with closing(slices):
                due = 0.0
                while (one := self._next_slice(slices, notes)) is not None:
                    self._shown = continuation = one
                    started = time.perf_counter()
                    if started > due:
                        self.view.show(continuation, self._number)
                        self.view.ask()
                        took = time.perf_counter() - started
                        due = started + max(SECONDS_BETWEEN_SHOWINGS, SHOWING_SHARE * took)
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            if continuation is not None:
                continuation.state = "stopped"
        finally:
            self._set_working(False)
            if continuation is not None:
                self._finish(continuation, notes)

    @staticmethod
    def _next_slice(slices: Iterator[Continuation], notes: list[str]) -> Continuation | None:
        """Go on writing for a moment; a warning would be printed where nobody looks for it."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            continuation = next(slices, None)
        notes += [str(one.message) for one in caught]
        return continuation

    def _finish(self, continuation: Continuation, notes: list[str]) -> None:
        self.view.show(continuation, self._number)
        self.history = [*self.history, continuation][-LONGEST_HISTORY:]
        self.past.options = [
            (f"{visible(one.prompt)[:30]!r}: {settings_in_words(one)}", place)
            for place, one in enumerate(self.history)
        ]
        rate = continuation.n_tokens / max(continuation.seconds, 1e-9)
        words = f"{continuation.state}: {continuation.n_tokens} tokens, {rate:,.0f} per second"
        self.message.say("; ".join([words, *notes]))

    def _compare(self, change: dict) -> None:
        places = change["new"]
        chosen = [self.history[place] for place in places]
        self.comparison.value = side_by_side(chosen, [f"text {place + 1}" for place in places])
        if len(chosen) == 1 and not self.is_writing:
            self._shown = chosen[0]
            self._number += 1
            self.view.show(self._shown, self._number)
            self.comparison.value = ""

    def _set_working(self, working: bool) -> None:
        self.generate.disabled, self.stop_button.disabled = working, not working
        self.past.disabled = working

    def _make_inputs(self, settings: GenerationConfig, prompt: str) -> None:
        self.prompt = labelled(
            widgets.Textarea, "Prompt", value=prompt, rows=3, layout={"width": "auto"}
        )
        self.temperature = labelled(
            widgets.FloatSlider, "Temperature", min=0, step=0.05,
            max=max(3, settings.temperature), value=settings.temperature,
            layout={"width": "26em"},
        )  # fmt: skip
        self.top_p = labelled(
            widgets.FloatSlider, "Top-p (1: all)", min=0.01, max=1, step=0.01,
            value=settings.top_p, layout={"width": "24em"},
        )  # fmt: skip
        number = widgets.BoundedIntText
        self.top_k = labelled(
            number, "Top-k (0: all)", min=0, max=10**6, value=settings.top_k,
            layout={"width": "13em"},
        )  # fmt: skip
        self.tokens = labelled(
            number, "Tokens", min=1, max=100_000, value=settings.max_new_tokens,
            layout={"width": "10em"},
        )  # fmt: skip
        self.samples = labelled(
            number, "Samples", min=1, max=16, value=settings.num_samples, layout={"width": "9em"}
        )
        # Text, because any whole number is a seed, and a number box of the browser ends at 2^53.
        self.seed = labelled(
            widgets.Text, "Seed", value=str(settings.seed if settings.seed is not None else 0),
            layout={"width": "14em"},
        )  # fmt: skip
        self.new_seed = widgets.Checkbox(
            value=settings.seed is None, description="a new seed each time", indent=False,
            layout={"width": "auto"},
        )  # fmt: skip
        self.file = labelled(widgets.Text, "File", value=NAME_OF_FILE, layout={"width": "22em"})

    def _make_buttons(self) -> None:
        make = partial(button, self.message)
        self.generate = make("Generate", "play", "continue the prompt", self.start)
        self.stop_button = make("Stop", "stop", "end the text here", self.stop)
        self.stop_button.disabled = True
        self.back = make("Previous token", "", "what it was drawn from", lambda: self.step(-1))
        self.forward = make("Next token", "", "what it was drawn from", lambda: self.step(1))
        self.save_button = make("Save", "save", "add the chosen texts to the file", self.save)

    def _rows(self) -> list[widgets.Widget]:
        def row(*parts: widgets.Widget) -> widgets.HBox:
            return widgets.HBox(parts, layout=WRAPPED)

        return [
            self.prompt,
            row(self.temperature, self.top_k, self.top_p),
            row(self.tokens, self.samples, self.seed, self.new_seed),
            row(self.generate, self.stop_button, self.back, self.forward),
            self.message, self.view, self.detail, self.past, self.comparison,
            row(self.file, self.save_button),
        ]  # fmt: skip


def show_playground(
    model: TransformerLM,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device | str | None = None,
) -> None:
    """Show a playground at this place of the page, and under it a line for who has no kernel."""
    from IPython.display import display

    display(Playground(model, tokenizer, config, device))
    line = "Nothing to click above? It needs a kernel: run this cell. In a terminal, the same call"
    display({"text/plain": f"{line} asks for one prompt after another."}, raw=True)
