"""A widget that steps through a ring allreduce and counts the bytes that each worker sends.

    RingStepper(workers=4)

It needs no ranks: `horovod_lm.analysis.ring` computes every state in this process.
"""

from __future__ import annotations

import asyncio
import html
import math
from collections.abc import Iterator
from typing import Any

import ipywidgets as widgets
import torch

from horovod_lm.analysis.ring import (
    ALLGATHER,
    REDUCE_SCATTER,
    START,
    RingState,
    ring_allreduce,
    star_numbers_sent,
)
from horovod_lm.jupyter.plots import Plot, plot_ring_steps
from horovod_lm.jupyter.plots.tables import name_of_sum
from horovod_lm.jupyter.widgets.widget_parts import Message, labelled, row, with_picture
from horovod_lm.utils.errors import ConfigError

STEP_INTERVAL = 1.0  # seconds
RANGES = {"workers": (2, 8), "numbers": (1, 1_000_000)}
BYTES_PER_NUMBER = 4  # float32
DESCRIPTIONS = {
    START: "each worker holds its own numbers, divided into chunks",
    REDUCE_SCATTER: "each worker has sent one chunk and added the received chunk to its own",
    ALLGATHER: "each worker has sent one complete sum and stored the received one",
}
# The picture, in SVG units.
WIDTH, HEIGHT = 720, 566
CENTRE_X, CENTRE_Y, RADIUS_X, RADIUS_Y = 360, 286, 310, 218
CELL_WIDTH, MAX_CELL_HEIGHT, MAX_STACK_HEIGHT = 84, 24, 106
MAX_OPACITY = 0.5  # of a complete sum's colour: text on it is readable in both themes


class RingStepper(widgets.VBox):
    """A ring allreduce, one step at a time.

    Args:
        workers: number of workers, 2 to 8.
        numbers: number of float32 values of each worker, 1 to 1,000,000.

    Raises:
        ConfigError: an argument is outside its range.
    """

    _task: asyncio.Task[None] | None = None

    def __init__(self, workers: int = 4, numbers: int = 24) -> None:
        for name, value in (("workers", workers), ("numbers", numbers)):
            low, high = RANGES[name]
            if not low <= value <= high:
                raise ConfigError(f"RingStepper({name}={value}): {name} must be {low} to {high:,}")
        self.states: list[RingState] = []
        self.message = Message()
        self.workers = self._number_input("workers", workers, "workers", "130px")
        self.numbers = self._number_input("numbers", numbers, "numbers of each", "220px")
        self.step = labelled(widgets.IntSlider, "step", max=2 * (workers - 1), width="280px")
        make = self.message.button
        self.back = make(
            "Back", "step-backward", "one step back", lambda: self._move(-1), width="110px"
        )
        self.forward = make(
            "Forward", "step-forward", "one step forward", lambda: self._move(1), width="110px"
        )
        self.play = make(
            "Play", "play", "one step per second, to the end", self._play_or_pause, width="110px"
        )
        self.headline, self.picture, self.account = (widgets.HTML() for _ in range(3))
        super().__init__(
            [
                row(self.workers, self.numbers),
                row(self.back, self.forward, self.play, self.step),
                self.headline, self.picture, self.account, self.message,
            ]
        )  # fmt: skip
        self._restart()
        self.step.observe(self.message.guarded(lambda _: self.update()), "value")
        for control in (self.workers, self.numbers):
            control.observe(self.message.guarded(lambda _: self._restart()), "value")

    @property
    def state(self) -> RingState:
        """The state that is shown."""
        return self.states[self.step.value]

    @property
    def is_playing(self) -> bool:
        """Whether the steps advance by themselves."""
        return self._task is not None and not self._task.done()

    def update(self) -> None:
        """Show the state of the current step."""
        state, last = self.state, self.step.max
        name = f"step {state.step} of {last}, {state.phase}" if state.step else START
        self.headline.value = f"<b>{html.escape(f'{name}: {DESCRIPTIONS[state.phase]}')}</b>"
        self.picture.value = ring_svg(state)
        self.account.value = html.escape(describe_traffic(state, self._n_numbers))
        self.back.disabled, self.forward.disabled = state.step == 0, self.step.value == last
        self.message.value = ""

    def plot(self) -> Plot:
        """Return all steps as a figure, for pages without a kernel."""
        return plot_ring_steps(self.states)

    def close(self) -> None:
        """Stop playing and remove the widget."""
        self._pause()
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return with_picture(super()._repr_mimebundle_(**kwargs), self.plot())

    def _number_input(self, name: str, value: int, label: str, width: str) -> widgets.Widget:
        low, high = RANGES[name]
        return labelled(widgets.BoundedIntText, label, value=value, min=low, max=high, width=width)

    def _restart(self) -> None:
        """Compute the steps for the current number of workers and of numbers."""
        self._pause()
        self._n_numbers = self.numbers.value
        self.states = ring_allreduce([torch.ones(self._n_numbers)] * self.workers.value)
        self.step.value = 0  # before the maximum, which could move the slider
        self.step.max = len(self.states) - 1
        self.update()

    def _move(self, by: int) -> None:
        self.step.value = min(max(0, self.step.value + by), self.step.max)

    def _play_or_pause(self) -> None:
        if self.is_playing:
            self._pause()
            return
        if self.step.value == self.step.max:
            self.step.value = 0
        self._name_play_button("Pause")
        self._task = self.message.start(self._play)
        # A callback: a task that is cancelled before its first step never runs.
        self._task.add_done_callback(lambda _: self._name_play_button("Play"))

    async def _play(self) -> None:
        while self.step.value < self.step.max:
            await asyncio.sleep(STEP_INTERVAL)
            self._move(1)

    def _name_play_button(self, description: str) -> None:
        self.play.description, self.play.icon = description, description.lower()

    def _pause(self) -> None:
        if self._task is not None:
            self._task.cancel()


def describe_traffic(state: RingState, numbers: int) -> str:
    """Compare what each worker has sent so far with one worker that gathers and broadcasts.

    Args:
        state: the current state.
        numbers: number of float32 values of each worker.
    """
    data, sent = numbers * BYTES_PER_NUMBER, max(state.numbers_sent) * BYTES_PER_NUMBER
    star = star_numbers_sent(numbers, state.workers) * BYTES_PER_NUMBER
    return (
        f"sent so far by each worker: {sent:,} bytes, {sent / data:.2f} times its {data:,};"
        f" a single worker that gathers and broadcasts sends {star:,}"
    )


# ---- the picture --------------------------------------------------------------------------------


def ring_svg(state: RingState) -> str:
    """Draw a state as SVG in the colours of JupyterLab's theme.

    The stronger a cell's colour, the more numbers are in its sum. A chunk that has just arrived has
    a thick frame, and an arrow that shows where it came from.
    """
    n, sums = state.workers, range(state.workers)
    names = [[name_of_sum(state.holds[w][c], c, n) for c in sums] for w in range(n)]
    title = "; ".join(f"worker {w} holds {', '.join(held)}" for w, held in enumerate(names))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' style="max-width: {WIDTH}px; width: 100%; color: var(--jp-ui-font-color1, #222)"'
        ' font-size="12" font-family="var(--jp-ui-font-family, sans-serif)" fill="currentColor">'
        f"<title>{title}</title>"
    ]
    chunks = {message.sender: message.chunk for message in state.messages}
    arrived = {(message.receiver, message.chunk) for message in state.messages}
    height = min(MAX_CELL_HEIGHT, MAX_STACK_HEIGHT / n)  # of a cell
    for worker in range(n):
        parts.extend(_arrow(worker, n, n * height, chunks.get(worker)))
    for worker in range(n):
        x, y = _on_ring(_angle(worker, n))
        top = y - n * height / 2
        parts.append(_text(x, top - 7, f"worker {worker}", ' font-weight="bold"'))
        for chunk, contributors in enumerate(state.holds[worker]):
            parts.extend(
                _cell(
                    x, top + chunk * height, height, chunk, names[worker][chunk],
                    len(contributors) / n, (worker, chunk) in arrived,
                )
            )  # fmt: skip
    return "".join([*parts, "</svg>"])


def _angle(worker: int, workers: int) -> float:
    """Return a worker's place on the ring, clockwise from the right, in radians.

    Worker 0 is at the top left, and no worker is where the ring is narrowest.
    """
    return 2 * math.pi * (worker - 0.5) / workers - math.pi / 2


def _on_ring(angle: float, share: float = 1.0) -> tuple[float, float]:
    x = CENTRE_X + share * RADIUS_X * math.cos(angle)
    return x, CENTRE_Y + share * RADIUS_Y * math.sin(angle)


def _cell(
    x: float, top: float, height: float, chunk: int, name: str, share: float, arrived: bool
) -> Iterator[str]:
    left, size = x - CELL_WIDTH / 2, min(12, height - 3)
    frame = 'stroke-width="2.5"' if arrived else 'stroke-width="1" stroke-opacity="0.45"'
    weight = ' font-weight="bold"' if arrived else ""
    yield (
        f'<rect x="{left:.1f}" y="{top + 1:.1f}" width="{CELL_WIDTH}" height="{height - 2:.1f}"'
        f' rx="3" fill="var(--jp-brand-color1, #0072B2)" fill-opacity="{MAX_OPACITY * share:.3f}"'
        f' stroke="currentColor" {frame}/>'
    )
    baseline = top + height / 2 + 0.35 * size
    yield _text(x + 8, baseline, name, f' font-size="{size:.1f}"{weight}')
    yield _text(left + 9, baseline, str(chunk), ' font-size="10" fill-opacity="0.7"')


def _arrow(worker: int, workers: int, stack_height: float, chunk: int | None) -> Iterator[str]:
    """Draw the arc to the next worker, in full colour if a chunk has just travelled along it."""

    def is_free(angle: float) -> bool:
        x, y = _on_ring(angle)
        for centre_x, centre_y in (_on_ring(start), _on_ring(end)):
            beside = abs(x - centre_x) >= CELL_WIDTH / 2 + 8
            above_or_below = not -stack_height / 2 - 26 < y - centre_y < stack_height / 2 + 10
            if not (beside or above_or_below):
                return False
        return True

    start, end = _angle(worker, workers), _angle(worker + 1, workers)
    angles = [start + (end - start) * part / 200 for part in range(201)]
    free = [angle for angle in angles if is_free(angle)]
    (x, y), (tip_x, tip_y) = _on_ring(free[0]), _on_ring(free[-1])
    near_x, near_y = _on_ring(free[-8])
    direction = math.degrees(math.atan2(tip_y - near_y, tip_x - near_x))
    opacity = 0.3 if chunk is None else 1
    yield (
        f'<path d="M {x:.1f} {y:.1f} A {RADIUS_X} {RADIUS_Y} 0 0 1 {tip_x:.1f} {tip_y:.1f}"'
        f' fill="none" stroke="currentColor" stroke-width="1.6" stroke-opacity="{opacity}"/>'
        f'<path d="M 2 0 L -9 -5 L -9 5 Z" fill-opacity="{opacity}"'
        f' transform="translate({tip_x:.1f} {tip_y:.1f}) rotate({direction:.1f})"/>'
    )
    if chunk is not None:
        x, y = _on_ring((free[0] + free[-1]) / 2, 0.84)
        yield _text(x, y + 4, f"chunk {chunk}")


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle"{attributes}>{text}</text>'
