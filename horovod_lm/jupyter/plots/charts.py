"""The class `Plot`, line charts, bar charts, and how every figure looks.

Lines and bars differ by colour and by line style or hatching, so every figure can be read in
greyscale. The colours are those of Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, which
are safe for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

Rows = Sequence[Mapping[str, Any]]  # of metrics.csv
Runs = Mapping[str, Rows]
Series = TypeVar("Series")
Style = TypeVar("Style")

BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000"
# Colour, line style, line width, marker. Lines may coincide, so the first one is wide and each
# next one is thinner and has gaps.
LINE_STYLES = (
    (BLUE, "-", 3.6, "o"),
    (ORANGE, "--", 1.8, "s"),
    (GREEN, "-.", 1.5, "^"),
    (PINK, ":", 1.5, "D"),
)
SINGLE_LINE = (BLUE, "-", 1.6, "o")
# Colour and hatching. Neighbours differ in lightness, too.
BAR_STYLES = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (PINK, "xx"), (BLACK, ""))
DOTS_PER_INCH = 110
STEPS = "optimizer step"


class Plot(Figure):
    """A figure that a notebook displays, with a fixed text for readers without the picture.

    It is rendered by Agg without pyplot, so it needs no window and no `close()`.

    Args:
        description: what the figure shows.
        width: inches.
        height: inches.
    """

    def __init__(self, description: str, width: float = 8.0, height: float = 3.6) -> None:
        super().__init__(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(self)
        self.description = description

    def __repr__(self) -> str:
        """Return the description: unlike an address, it is the same at every execution."""
        return f"figure: {self.description}"

    def png(self) -> bytes:
        """Return the picture as PNG; the same figure always gives the same bytes."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the picture to a PNG file, create its folder, and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png())
        return path

    _repr_png_ = png  # called by Jupyter


def with_styles(
    series: Mapping[str, Series], styles: Sequence[Style], what: str
) -> Iterator[tuple[tuple[str, Series], Style]]:
    """Return ((name, series), style) for each series, each with a style of its own.

    Args:
        series: what the figure compares, by name.
        styles: `LINE_STYLES` or `BAR_STYLES`.
        what: the plural noun that the error message uses.

    Raises:
        ValueError: there are no series, or more than styles.
    """
    if not 0 < len(series) <= len(styles):
        raise ValueError(f"a figure shows 1 to {len(styles)} {what}, not {len(series)}")
    return zip(series.items(), styles, strict=False)


def with_run_styles(runs: Runs) -> Iterator[tuple[tuple[str, Rows], tuple[str, str, float, str]]]:
    """Return ((name, rows), style) for each run."""
    return with_styles(runs, [SINGLE_LINE] if len(runs) == 1 else LINE_STYLES, "runs")


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set a panel's title and axis labels, and its grid."""
    axes.set(title=title, xlabel=x, ylabel=y)
    if x == STEPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of a panel of horizontal bars, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def plot_lines(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Plot:
    """Draw 1 to 4 lines over the same x values.

    Args:
        x: the x values, ascending.
        lines: label -> a y value for each x value.
        title: the figure's title.
        x_label: the name of the x axis, with its unit.
        y_label: the name of the y axis, with its unit.
        log_x: a logarithmic x axis of base 2, with a tick at each x value.
        log_y: a logarithmic y axis; otherwise it begins at 0.
        marks: label -> the x value of a vertical line.

    Raises:
        ValueError: there are no lines, or more than 4.
    """
    plot = Plot(f"{title}: {y_label} over {x_label}, {' and '.join(lines)}")
    axes = plot.add_subplot()
    for (name, y), (colour, line, width, marker) in with_styles(lines, LINE_STYLES, "lines"):
        axes.plot(
            x, y, line, color=colour, linewidth=min(width, 2.4), marker=marker, markersize=5,
            label=name,
        )  # fmt: skip
    for label, value in (marks or {}).items():
        axes.axvline(value, color="0.45", linestyle=(0, (6, 3)), label=label)
    label_axes(axes, title, x_label, y_label)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
    elif all(isinstance(value, int) for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return plot


def plot_bars(
    rows: Sequence[str],
    series: Mapping[str, Iterable[float] | Tensor],
    title: str,
    label: str,
    *,
    layout: Literal["grouped", "stacked", "panels"] = "grouped",
    levels: Mapping[str, float] | None = None,
) -> Plot:
    """Draw horizontal bars in 1 to 5 colours.

    Args:
        rows: the labels of the rows, from top to bottom.
        series: name -> a value for each row.
        title: the figure's title.
        label: what the values are, with the unit.
        layout: "grouped": the bars of a row one below the other, each with its value; "stacked":
            end to end; "panels": each series in a panel of its own.
        levels: label -> the value of a vertical line to compare with.

    Raises:
        ValueError: there are no series, or more than 5.
    """
    bars_in_a_row = len(series) if layout == "grouped" else 1
    plot = Plot(
        f"{title}: {label} of {' and '.join(series)}, {len(rows)} rows",
        height=1.5 + (0.12 + 0.2 * bars_in_a_row if layout != "stacked" else 0.45) * len(rows),
    )
    panels = plot.subplots(
        1, max(1, len(series)) if layout == "panels" else 1, sharex=True, sharey=True, squeeze=False
    )[0]
    draw_bars(panels, series, layout)
    for axes, name in zip(panels, series, strict=False):
        label_axes(axes, name if layout == "panels" else title, label, "")
        for level, value in (levels or {}).items():
            axes.axvline(value, color=BLACK, linestyle="--", linewidth=1.6, label=level)
    label_rows(panels[0], rows)
    if layout == "panels":
        plot.suptitle(title)
    elif len(series) > 1 or levels:
        plot.legend(loc="outside lower center", ncols=3, frameon=False)
    return plot


def draw_bars(
    panels: Sequence[Axes], series: Mapping[str, Iterable[float] | Tensor], layout: str
) -> None:
    """Draw bars into panels, or into the only one; `plot_bars` explains the arguments."""
    styled_series = with_styles(series, BAR_STYLES, "series")
    height = 0.8 / len(series) if layout == "grouped" else 0.7
    ends: list[float] = []
    for number, ((name, values), (colour, hatch)) in enumerate(styled_series):
        axes = panels[number if layout == "panels" else 0]
        widths = [float(value) for value in values]
        ends = ends or [0.0] * len(widths)
        offset = height * (number - (len(series) - 1) / 2) if layout == "grouped" else 0.0
        bars = axes.barh(
            [row + offset for row in range(len(widths))], widths, height, left=ends, color=colour,
            hatch=hatch, edgecolor="white", label=name if len(series) > 1 else None,
        )  # fmt: skip
        if layout == "grouped":
            axes.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=3)
            axes.margins(x=0.1)  # space for the numbers
        elif layout == "stacked":
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
