"""A widget that steps through a ring allreduce and counts the bytes that each worker sends.

    RingStepper(workers=4)

It needs no ranks: `horovod_lm.analysis.ring` computes every state in this process.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import ipywidgets as widgets
import torch

from horovod_lm.analysis.ring import (
    ALLGATHER,
    REDUCE_SCATTER,
    START,
    RingState,
    ring_allreduce,
)
from horovod_lm.jupyter.plots import name_of_sum, plot_ring_steps
from horovod_lm.jupyter.widgets.widget_parts import BaseWidget, labelled, row, with_picture

STEP_INTERVAL = 1.0  # seconds
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


class RingStepper(BaseWidget):
    """A ring allreduce, one step at a time.

    Args:
        workers: number of workers, 2 to 8.
        numbers: number of float32 values of each worker, 1 to 1,000,000.

    A value outside of its range becomes the nearest one inside.
    """

    def __init__(self, workers: int = 4, numbers: int = 24) -> None:
        super().__init__()
        number = widgets.BoundedIntText
        self.workers = labelled(number, "workers", "130px", value=workers, min=2, max=8)
        self.numbers = labelled(
            number, "numbers of each", "220px", value=numbers, min=1, max=1_000_000
        )
        self.step = labelled(widgets.IntSlider, "step", "280px")
        make, wide = self.button, {"width": "110px"}
        self.back = make("Back", "step-backward", "one step back", lambda: self._move(-1), **wide)
        self.forward = make(
            "Forward", "step-forward", "one step forward", lambda: self._move(1), **wide
        )
        self.play = make("Play", "play", "one step per second, to the end", self._toggle, **wide)
        self.headline, self.picture, self.account = (widgets.HTML() for _ in range(3))
        self.children = [
            row(self.workers, self.numbers),
            row(self.back, self.forward, self.play, self.step),
            self.headline, self.picture, self.account, self.message,
        ]  # fmt: skip
        self._restart()
        self.on_change(self.step, self.update)
        self.on_change(self.workers, self._restart)
        self.on_change(self.numbers, self._restart)

    def update(self) -> None:
        """Show the state of the current step."""
        state, last = self.states[self.step.value], self.step.max
        name = f"step {state.step} of {last}, {state.phase}" if state.step else START
        self.headline.value = f"<b>{name}: {DESCRIPTIONS[state.phase]}</b>"
        self.picture.value = ring_svg(state)
        self.account.value = describe_traffic(state, self.numbers.value)
        self.back.disabled, self.forward.disabled = state.step == 0, self.step.value == last
        self.message.value = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return with_picture(super()._repr_mimebundle_(**kwargs), plot_ring_steps(self.states))

    def _restart(self) -> None:
        """Compute the steps for the current number of workers and of numbers."""
        self.cancel_task()
        self.states = ring_allreduce([torch.ones(self.numbers.value)] * self.workers.value)
        self.step.value = 0  # before the maximum, which could move the slider
        self.step.max = len(self.states) - 1
        self.update()

    def _move(self, by: int) -> None:
        self.step.value = min(max(0, self.step.value + by), self.step.max)

    def _toggle(self) -> None:
        """Play, or pause."""
        if self.is_busy:
            self.cancel_task()
            return
        if self.step.value == self.step.max:
            self.step.value = 0
        self._name_play_button("Pause")
        self.start_task(self._play, at_end=lambda: self._name_play_button("Play"))

    async def _play(self) -> None:
        while self.step.value < self.step.max:
            await asyncio.sleep(STEP_INTERVAL)
            self._move(1)

    def _name_play_button(self, description: str) -> None:
        self.play.description, self.play.icon = description, description.lower()


def describe_traffic(state: RingState, numbers: int) -> str:
    """Compare what each worker of `numbers` float32 values has sent so far with a star."""
    data, sent = numbers * BYTES_PER_NUMBER, max(state.numbers_sent) * BYTES_PER_NUMBER
    star = (state.workers - 1) * data  # its root sends the sum to each other worker
    return (
        f"sent so far by each worker: {sent:,} bytes, {sent / data:.2f} times its {data:,};"
        f" a single worker that gathers and broadcasts sends {star:,}"
    )


def ring_svg(state: RingState) -> str:
    """Draw a state as SVG in the colours of JupyterLab's theme.

    The stronger a cell's colour, the more numbers are in its sum. A chunk that has just arrived has
    a thick frame, and an arrow that shows where it came from.
    """
    n = state.workers
    names = [[name_of_sum(whose, c, n) for c, whose in enumerate(held)] for held in state.holds]
    title = "; ".join(f"worker {w} holds {', '.join(held)}" for w, held in enumerate(names))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' style="max-width: {WIDTH}px; width: 100%; color: var(--jp-ui-font-color1, #222)"'
        ' font-size="12" font-family="var(--jp-ui-font-family, sans-serif)" fill="currentColor">'
        f"<title>{title}</title>"
    ]
    opacity = 1 if state.messages else 0.3
    parts.append(
        f'<ellipse cx="{CENTRE_X}" cy="{CENTRE_Y}" rx="{RADIUS_X}" ry="{RADIUS_Y}" fill="none"'
        f' stroke="currentColor" stroke-width="1.6" stroke-opacity="{opacity}"/>'
    )
    parts += [_arrowhead(_angle(worker + 0.5, n), opacity) for worker in range(n)]
    arrived = {(message.receiver, message.chunk) for message in state.messages}
    height = min(MAX_CELL_HEIGHT, MAX_STACK_HEIGHT / n)  # of a cell
    for worker in range(n):
        x, y = _on_ring(_angle(worker, n))
        top = y - n * height / 2
        # The ring ends at the cells and at the worker's name.
        parts.append(
            f'<rect x="{x - CELL_WIDTH / 2 - 8:.1f}" y="{top - 26:.1f}" width="{CELL_WIDTH + 16}"'
            f' height="{n * height + 36:.1f}" fill="var(--jp-layout-color0, white)"/>'
        )
        parts.append(_text(x, top - 7, f"worker {worker}", ' font-weight="bold"'))
        for chunk, name in enumerate(names[worker]):
            share = len(state.holds[worker][chunk]) / n
            parts += _cell(
                x, top + chunk * height, height, chunk, name, share, (worker, chunk) in arrived
            )
    for message in state.messages:
        x, y = _on_ring(_angle(message.sender + 0.5, n), 0.79)
        parts.append(_text(x, y + 4, f"chunk {message.chunk}"))
    return "".join([*parts, "</svg>"])


def _angle(worker: float, workers: int) -> float:
    """Return a worker's place on the ring, clockwise from the right, in radians.

    Worker 0 is at the top left, and no worker is where the ring is narrowest.
    """
    return 2 * math.pi * (worker - 0.5) / workers - math.pi / 2


def _on_ring(angle: float, share: float = 1.0) -> tuple[float, float]:
    x = CENTRE_X + share * RADIUS_X * math.cos(angle)
    return x, CENTRE_Y + share * RADIUS_Y * math.sin(angle)


def _cell(
    x: float, top: float, height: float, chunk: int, name: str, share: float, arrived: bool
) -> list[str]:
    left, size = x - CELL_WIDTH / 2, min(12, height - 3)
    frame = 'stroke-width="2.5"' if arrived else 'stroke-width="1" stroke-opacity="0.45"'
    weight = ' font-weight="bold"' if arrived else ""
    baseline = top + height / 2 + 0.35 * size
    return [
        f'<rect x="{left:.1f}" y="{top + 1:.1f}" width="{CELL_WIDTH}" height="{height - 2:.1f}"'
        f' rx="3" fill="var(--jp-brand-color1, #0072B2)" fill-opacity="{MAX_OPACITY * share:.3f}"'
        f' stroke="currentColor" {frame}/>',
        _text(x + 8, baseline, name, f' font-size="{size:.1f}"{weight}'),
        _text(left + 9, baseline, str(chunk), ' font-size="10" fill-opacity="0.7"'),
    ]


def _arrowhead(angle: float, opacity: float) -> str:
    """Draw an arrowhead at a place of the ring, clockwise."""
    x, y = _on_ring(angle)
    direction = math.degrees(math.atan2(RADIUS_Y * math.cos(angle), -RADIUS_X * math.sin(angle)))
    return (
        f'<path d="M 6 0 L -5 -5 L -5 5 Z" fill-opacity="{opacity}"'
        f' transform="translate({x:.1f} {y:.1f}) rotate({direction:.1f})"/>'
    )


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle"{attributes}>{text}</text>'
