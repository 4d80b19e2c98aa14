"""How every figure of the course looks: colours, lines, labels, and `Plot`, which shows itself.

What a figure tells apart differs by colour and by line style or hatching, so that every figure can
be read without colours too. The colours are those of Okabe and Ito (2008),
https://jfly.uni-koeln.de/color/, which differ in lightness and for colour-blind eyes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Rows]
Thing = TypeVar("Thing")
Style = TypeVar("Style")

BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000"
# How runs differ: colour, line style, line width, marker. Runs may lie exactly over each other, so
# the first one is wide and each next one leaves gaps.
RUN_STYLES = (
    (BLUE, "-", 3.6, "o"),
    (ORANGE, "--", 1.8, "s"),
    (GREEN, "-.", 1.5, "^"),
    (PINK, ":", 1.5, "D"),
)
# How bars differ: colour and hatching. Neighbours differ by lightness, too.
BAR_STYLES = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (PINK, "xx"), (BLACK, ""))
ALONE = (BLUE, "-", 1.6, "o")
DOTS_PER_INCH = 110
STEPS = "optimizer step"


class Plot(Figure):
    """A figure that shows itself in a notebook, and whose text says what it shows.

    It is drawn by Agg, without a window or pyplot's list of open figures, so that a server or a
    test draws the same picture.
    """

    def __init__(self, description: str, width: float = 8.0, height: float = 3.6) -> None:
        super().__init__(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(self)
        self.description = description

    def __repr__(self) -> str:
        """Say what the figure shows: the same at every execution, unlike an address."""
        return f"figure: {self.description}"

    def png(self) -> bytes:
        """Return the picture; the same figure always gives the same bytes."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the picture to a PNG file and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png())
        return path

    _repr_png_ = png  # what Jupyter asks an object for


def styled_runs(runs: Runs) -> Iterator[tuple[tuple[str, Rows], tuple[str, str, float, str]]]:
    """Return each run, as (name, rows), with its style."""
    return styled(runs, [ALONE] if len(runs) == 1 else RUN_STYLES, "runs")


def styled(
    things: Mapping[str, Thing], styles: Sequence[Style], what: str
) -> Iterator[tuple[tuple[str, Thing], Style]]:
    """Return each thing, as (name, thing), with a style that no other has.

    Args:
        things: what a figure tells apart, by name.
        styles: as many as it can tell apart.
        what: the things are called, in the plural.

    Raises:
        ValueError: there are none, or more than styles.
    """
    if not 0 < len(things) <= len(styles):
        raise ValueError(f"a figure shows 1 to {len(styles)} {what}, not {len(things)}")
    return zip(things.items(), styles, strict=False)


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Write a panel's title and its axes' names with units, and take away what says nothing."""
    axes.set(title=title, xlabel=x, ylabel=y)
    if x == STEPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a panel with horizontal bars, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def name_runs(runs: Runs) -> str:
    """Return the names of runs as a figure's text lists them."""
    return " and ".join(name or "one run" for name in runs)
