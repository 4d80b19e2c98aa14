"""A widget that steps through a ring allreduce and counts the bytes that each worker sends.

    RingStepper(workers=4)

It needs no ranks: `horovod_lm.analysis.ring` computes every state in this process.
"""

from __future__ import annotations

import math
from typing import Any

import ipywidgets as widgets
import torch

from horovod_lm.analysis.ring import ALLGATHER, REDUCE_SCATTER, START, RingState, ring_allreduce
from horovod_lm.jupyter.plots import name_of_sum, plot_ring_steps
from horovod_lm.jupyter.widgets.widget_parts import BaseWidget, labelled, row, with_picture

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
CHUNK_NUMBER = 'font-size="10" font-weight="normal" fill-opacity="0.7"'
ARRIVED, PRESENT = 'stroke-width="2.5" font-weight="bold"', 'stroke-opacity="0.45"'


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
        self.numbers = labelled(number, "numbers of each", "220px", value=numbers, min=1, max=10**6)
        self.step = labelled(widgets.IntSlider, "step", "480px")
        self.headline, self.picture, self.account = (widgets.HTML() for _ in range(3))
        self.children = [
            row(self.workers, self.numbers), self.step,
            self.headline, self.picture, self.account, self.message,
        ]  # fmt: skip
        self._restart()
        self.on_change(self.step, self.update)
        self.on_change(self.workers, self._restart)
        self.on_change(self.numbers, self._restart)

    def update(self) -> None:
        """Show the state of the current step."""
        state = self.states[self.step.value]
        name = f"step {state.step} of {self.step.max}, {state.phase}" if state.step else START
        self.headline.value = f"<b>{name}: {DESCRIPTIONS[state.phase]}</b>"
        self.picture.value = ring_svg(state)
        self.account.value = describe_traffic(state, self.numbers.value)
        self.message.value = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return with_picture(super()._repr_mimebundle_(**kwargs), plot_ring_steps(self.states))

    def _restart(self) -> None:
        """Compute the steps for the current number of workers and of numbers."""
        self.states = ring_allreduce([torch.ones(self.numbers.value)] * self.workers.value)
        self.step.value = 0  # before the maximum, which could move the slider
        self.step.max = len(self.states) - 1
        self.update()


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
    n, opacity = state.workers, 1 if state.messages else 0.3
    height = min(MAX_CELL_HEIGHT, MAX_STACK_HEIGHT / n)  # of a cell
    names = [[name_of_sum(whose, c, n) for c, whose in enumerate(held)] for held in state.holds]
    title = "; ".join(f"worker {w} holds {', '.join(held)}" for w, held in enumerate(names))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' style="max-width: {WIDTH}px; width: 100%; color: var(--jp-ui-font-color1, #222)"'
        ' font-size="12" font-family="var(--jp-ui-font-family, sans-serif)" fill="currentColor">'
        f'<title>{title}</title><ellipse cx="{CENTRE_X}" cy="{CENTRE_Y}" rx="{RADIUS_X}"'
        f' ry="{RADIUS_Y}" fill="none" stroke="currentColor" stroke-width="1.6"'
        f' stroke-opacity="{opacity}"/>'
    ]
    arrived = {(message.receiver, message.chunk) for message in state.messages}
    for worker, held in enumerate(names):
        x, y, direction = _on_ring(worker + 0.5, n)
        parts.append(
            f'<path d="M 6 0 L -5 -5 L -5 5 Z" fill-opacity="{opacity}"'
            f' transform="translate({x:.1f} {y:.1f}) rotate({direction:.1f})"/>'
        )
        x, y, _ = _on_ring(worker, n)
        top = y - n * height / 2
        # The ring ends at the cells and at the worker's name.
        parts.append(
            f'<rect x="{x - CELL_WIDTH / 2 - 8:.1f}" y="{top - 26:.1f}" width="{CELL_WIDTH + 16}"'
            f' height="{n * height + 36:.1f}" fill="var(--jp-layout-color0, white)"/>'
        )
        parts.append(_text(x, top - 11, f"worker {worker}", 'font-weight="bold"'))
        for chunk, name in enumerate(held):
            cell = _cell(height, chunk, name, len(state.holds[worker][chunk]) / n)
            look = ARRIVED if (worker, chunk) in arrived else PRESENT
            place = f"translate({x:.1f} {top + (chunk + 0.5) * height:.1f})"
            parts.append(f'<g transform="{place}" {look}>{cell}</g>')
    for message in state.messages:
        x, y, _ = _on_ring(message.sender + 0.5, n, share=0.79)
        parts.append(_text(x, y, f"chunk {message.chunk}"))
    return "".join([*parts, "</svg>"])


def _on_ring(worker: float, workers: int, share: float = 1.0) -> tuple[float, float, float]:
    """Return a worker's place, and the ring's direction there in degrees, clockwise.

    Worker 0 is at the top left, and no worker is where the ring is narrowest. A share below 1 is
    inside the ring.
    """
    angle = 2 * math.pi * (worker - 0.5) / workers - math.pi / 2
    right, down = math.cos(angle), math.sin(angle)
    direction = math.degrees(math.atan2(RADIUS_Y * right, -RADIUS_X * down))
    return CENTRE_X + share * RADIUS_X * right, CENTRE_Y + share * RADIUS_Y * down, direction


def _cell(height: float, chunk: int, name: str, share: float) -> str:
    """Draw a chunk around the origin: its number, and the name of a sum of a share of all."""
    size = min(12, height - 3)
    return (
        f'<rect x="{-CELL_WIDTH / 2}" y="{1 - height / 2:.1f}" width="{CELL_WIDTH}"'
        f' height="{height - 2:.1f}" rx="3" fill="var(--jp-brand-color1, #0072B2)"'
        f' fill-opacity="{MAX_OPACITY * share:.3f}" stroke="currentColor"/>'
        + _text(8, 0, name, f'font-size="{size:.1f}"')
        + _text(9 - CELL_WIDTH / 2, 0, str(chunk), CHUNK_NUMBER)
    )


def _text(x: float, y: float, text: str, look: str = "") -> str:
    """Draw a text around a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" dy="0.35em" text-anchor="middle" {look}>{text}</text>'
