"""A ring of workers as an SVG picture: what each one holds, and what has just travelled.

Its colours are JupyterLab's, so it follows the theme; a browser without them sees black on white.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from horovod_lm.jupyter.plots.ring import name_of_sum
from horovod_lm.ring import RingState

WIDTH, HEIGHT = 720, 566
CENTRE_X, CENTRE_Y, RADIUS_X, RADIUS_Y = 360, 286, 310, 218
CELL_WIDTH, LARGEST_CELL_HEIGHT, LARGEST_STACK = 84, 24, 106
STRONGEST = 0.5  # opacity of a complete sum's colour: text on it stays readable in both themes
LABEL_INSIDE = 0.84  # where on the way from the centre to the ring a travelling chunk's name stands
INK = "var(--jp-ui-font-color1, #222)"
COLOUR = "var(--jp-brand-color1, #0072B2)"


@dataclass(frozen=True)
class _Stack:
    """Where a worker's chunks stand: one cell for each, from the top down."""

    angle: float  # on the ring, clockwise from the right, in radians
    x: float  # of its centre
    y: float
    cell_height: float
    cells: int

    @property
    def left(self) -> float:
        return self.x - CELL_WIDTH / 2

    @property
    def top(self) -> float:
        return self.y - self.cells * self.cell_height / 2

    def is_near(self, x: float, y: float) -> bool:
        """Say whether a point is under the cells or the worker's name."""
        half = self.cells * self.cell_height / 2
        return abs(x - self.x) < CELL_WIDTH / 2 + 8 and -half - 26 < y - self.y < half + 10


def describe(state: RingState) -> str:
    """Return in words what every worker holds."""
    rows = (
        f"worker {worker} holds "
        + ", ".join(name_of_sum(whose, chunk, state.workers) for chunk, whose in enumerate(row))
        for worker, row in enumerate(state.holds)
    )
    return "; ".join(rows)


def ring_svg(state: RingState) -> str:
    """Draw a state as SVG, for an HTML page.

    The stronger a cell's colour, the more numbers are in its sum; a thick frame says that the chunk
    has just arrived, and an arrow where it came from.
    """
    stacks = [_stack(worker, state.workers) for worker in range(state.workers)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' style="max-width: {WIDTH}px; width: 100%; color: {INK}" font-size="12"'
        ' font-family="var(--jp-ui-font-family, sans-serif)" fill="currentColor">'
        f"<title>{describe(state)}</title>"
    ]
    chunks = {message.sender: message.chunk for message in state.messages}
    if state.workers > 1:
        for sender, start in enumerate(stacks):
            end = stacks[(sender + 1) % state.workers]
            parts.extend(_arrow(start, end, chunks.get(sender)))
    arrived = {(message.receiver, message.chunk) for message in state.messages}
    for worker, stack in enumerate(stacks):
        parts.append(_text(stack.x, stack.top - 7, f"worker {worker}", ' font-weight="bold"'))
        for chunk in range(state.workers):
            parts.extend(_cell(state, stack, worker, chunk, (worker, chunk) in arrived))
    return "".join([*parts, "</svg>"])


def _stack(worker: int, workers: int) -> _Stack:
    # Worker 0 at the top left, and nobody where the ring is narrowest.
    angle = 2 * math.pi * (worker - 0.5) / workers - math.pi / 2
    height = min(LARGEST_CELL_HEIGHT, LARGEST_STACK / workers)
    return _Stack(angle, *_on_the_ring(angle), height, workers)


def _on_the_ring(angle: float, share: float = 1.0) -> tuple[float, float]:
    x = CENTRE_X + share * RADIUS_X * math.cos(angle)
    return x, CENTRE_Y + share * RADIUS_Y * math.sin(angle)


def _cell(state: RingState, stack: _Stack, worker: int, chunk: int, arrived: bool) -> Iterator[str]:
    whose, y = state.holds[worker][chunk], stack.top + chunk * stack.cell_height
    frame = 'stroke-width="2.5"' if arrived else 'stroke-width="1" stroke-opacity="0.45"'
    yield (
        f'<rect x="{stack.left:.1f}" y="{y + 1:.1f}" width="{CELL_WIDTH}"'
        f' height="{stack.cell_height - 2:.1f}" rx="3" fill="{COLOUR}"'
        f' fill-opacity="{STRONGEST * len(whose) / state.workers:.3f}"'
        f' stroke="currentColor" {frame}/>'
    )
    size = min(12, stack.cell_height - 3)
    middle = y + stack.cell_height / 2 + 0.35 * size
    weight = ' font-weight="bold"' if arrived else ""
    name = name_of_sum(whose, chunk, state.workers)
    yield _text(stack.x + 8, middle, name, f' font-size="{size:.1f}"{weight}')
    yield _text(stack.left + 9, middle, str(chunk), ' font-size="10" fill-opacity="0.7"')


def _arrow(start: _Stack, end: _Stack, chunk: int | None) -> Iterator[str]:
    """Draw the way from one stack to the next along the ring, strong where a chunk travelled."""
    whole = (end.angle - start.angle) % (2 * math.pi)
    steps = [start.angle + whole * step / 200 for step in range(201)]
    free = [
        angle
        for angle in steps
        if not start.is_near(*_on_the_ring(angle)) and not end.is_near(*_on_the_ring(angle))
    ]
    (x, y), (tip_x, tip_y) = _on_the_ring(free[0]), _on_the_ring(free[-1])
    direction = math.atan2(tip_y - _on_the_ring(free[-8])[1], tip_x - _on_the_ring(free[-8])[0])
    opacity = 0.3 if chunk is None else 1
    yield (
        f'<path d="M {x:.1f} {y:.1f} A {RADIUS_X} {RADIUS_Y} 0 0 1 {tip_x:.1f} {tip_y:.1f}"'
        f' fill="none" stroke="currentColor" stroke-width="1.6" stroke-opacity="{opacity}"/>'
        f'<path d="M 2 0 L -9 -5 L -9 5 Z" fill-opacity="{opacity}"'
        f' transform="translate({tip_x:.1f} {tip_y:.1f}) rotate({math.degrees(direction):.1f})"/>'
    )
    if chunk is not None:
        x, y = _on_the_ring((free[0] + free[-1]) / 2, LABEL_INSIDE)
        yield _text(x, y + 4, f"chunk {chunk}")


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle"{more}>{words}</text>'
