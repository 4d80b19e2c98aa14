"""A ring allreduce, stepped through: chunks move round the workers, and their bytes are counted.

    RingStepper(workers=4)

It needs no ranks: `horovod_lm.ring` has computed every state before the first one is shown.
"""

from __future__ import annotations

import asyncio
import html
from functools import partial
from typing import Any

import ipywidgets as widgets
import torch

from horovod_lm.jupyter.plots import Plot, plot_ring_steps
from horovod_lm.jupyter.ring_picture import ring_svg
from horovod_lm.jupyter.widget_parts import WRAPPED, Message, button, labelled, with_still
from horovod_lm.ring import (
    ALLGATHER,
    REDUCE_SCATTER,
    START,
    RingState,
    ring_allreduce,
    star_numbers_sent,
)
from horovod_lm.utils.errors import ConfigError

SECONDS_BETWEEN_STEPS = 1.0
FEWEST, MOST_WORKERS, MOST_NUMBERS = 2, 8, 1_000_000
BYTES_PER_NUMBER = 4  # float32
WHAT_HAPPENS = {
    START: "each worker holds its own numbers, cut into chunks",
    REDUCE_SCATTER: "each worker has sent one chunk, and added the one that came to its own",
    ALLGATHER: "each worker has sent one finished sum, and keeps the one that came",
}


def headline(state: RingState, steps: int) -> str:
    """Say which step this is, and what happened in it."""
    where = f"step {state.step} of {steps}, {state.phase}" if state.step else START
    return f"{where}: {WHAT_HAPPENS[state.phase]}"


def account(state: RingState, numbers: int) -> str:
    """Say what a worker has sent so far, and what one that does it all would have to send.

    Args:
        state: now.
        numbers: how many each worker brings.
    """
    data, sent = numbers * BYTES_PER_NUMBER, max(state.numbers_sent) * BYTES_PER_NUMBER
    star = star_numbers_sent(numbers, state.workers) * BYTES_PER_NUMBER
    return (
        f"sent so far by each worker: {sent:,} bytes, {sent / data:.2f} times its {data:,};"
        f" a single worker that gathers and broadcasts sends {star:,}"
    )


class RingStepper(widgets.VBox):
    """A ring to step through; it shows itself at the end of a cell.

    Args:
        workers: how many, 2 to 8.
        numbers: how many float32 numbers each one brings.

    Raises:
        ConfigError: a number makes no sense.
    """

    _task: asyncio.Task | None = None  # while it plays, and after

    def __init__(self, workers: int = 4, numbers: int = 24) -> None:
        for name, value, low, high in (
            ("workers", workers, FEWEST, MOST_WORKERS),
            ("numbers", numbers, 1, MOST_NUMBERS),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"RingStepper({name}={value}): {name} must be {low} to {high:,}, so that there"
                    " is something to see"
                )
        self.states: list[RingState] = []
        self.message = Message()
        self._make_inputs(workers, numbers)
        self._make_buttons()
        self.headline, self.picture, self.account = (widgets.HTML() for _ in range(3))
        super().__init__(
            [
                widgets.HBox([self.workers, self.numbers], layout=WRAPPED),
                widgets.HBox([self.back, self.forward, self.play, self.step], layout=WRAPPED),
                self.headline, self.picture, self.account, self.message,
            ]
        )  # fmt: skip
        self._start_again()
        for control, act in (
            (self.step, self.look),
            (self.workers, self._start_again),
            (self.numbers, self._start_again),
        ):
            control.observe(self.message.guarded(lambda _, act=act: act()), "value")

    @property
    def state(self) -> RingState:
        """The state that is shown."""
        return self.states[self.step.value]

    @property
    def is_playing(self) -> bool:
        """Whether it steps forward by itself."""
        return self._task is not None and not self._task.done()

    def look(self) -> None:
        """Show the state that the slider stands at."""
        self.headline.value = f"<b>{html.escape(headline(self.state, self.step.max))}</b>"
        self.picture.value = ring_svg(self.state)
        self.account.value = html.escape(account(self.state, self._numbers_shown))
        self.back.disabled = self.step.value == 0
        self.forward.disabled = self.step.value == self.step.max
        self.message.value = ""

    def still(self) -> Plot:
        """Return all steps in one picture, for readers without a kernel."""
        return plot_ring_steps(self.states)

    def close(self) -> None:
        """Stop playing, and take the widget away."""
        self._pause()
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Give a page the widget, and the picture of it that stays when there is no kernel."""
        return with_still(super()._repr_mimebundle_(**kwargs), self.still())

    # ---- inside ---------------------------------------------------------------------------------

    def _make_inputs(self, workers: int, numbers: int) -> None:
        self.workers = labelled(
            widgets.BoundedIntText, "workers", value=workers, min=FEWEST, max=MOST_WORKERS,
            layout={"width": "130px"},
        )  # fmt: skip
        self.numbers = labelled(
            widgets.BoundedIntText, "numbers of each", value=numbers, min=1, max=MOST_NUMBERS,
            layout={"width": "220px"},
        )  # fmt: skip
        self.step = labelled(
            widgets.IntSlider, "step", value=0, min=0, max=2 * (workers - 1),
            layout={"width": "280px"},
        )  # fmt: skip

    def _make_buttons(self) -> None:
        make = partial(button, self.message, width="110px")
        self.back = make("Back", "step-backward", "one step back", lambda: self._move(-1))
        self.forward = make("Forward", "step-forward", "one step forward", lambda: self._move(1))
        self.play = make(
            "Play", "play", "step forward once a second, to the end", self._play_or_pause
        )

    def _start_again(self) -> None:
        """Compute the steps of as many workers and numbers as are asked for now."""
        self._pause()
        self._numbers_shown = self.numbers.value
        self.states = ring_allreduce([torch.ones(self._numbers_shown)] * self.workers.value)
        self.step.value = 0  # before the slider is made shorter, which would move it
        self.step.max = len(self.states) - 1
        self.look()

    def _move(self, by: int) -> None:
        self.step.value = min(max(0, self.step.value + by), self.step.max)

    def _play_or_pause(self) -> None:
        if self.is_playing:
            self._pause()
            return
        if self.step.value == self.step.max:
            self.step.value = 0
        self._task = asyncio.ensure_future(self._play())
        # Also where it is cancelled before its first step.
        self._task.add_done_callback(lambda _: self._name_play_button("Play"))
        self._name_play_button("Pause")

    async def _play(self) -> None:
        """Step forward until the end, which also ends what nobody looks at any more."""
        while self.step.value < self.step.max:
            await asyncio.sleep(SECONDS_BETWEEN_STEPS)
            self._move(1)

    def _name_play_button(self, description: str) -> None:
        self.play.description, self.play.icon = description, description.lower()

    def _pause(self) -> None:
        if self.is_playing:
            self._task.cancel()
