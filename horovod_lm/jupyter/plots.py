"""Every figure of the course: plain functions from the rows of `read_metrics` to a figure.

Runs are told apart by colour and by line style, the parts of a step by colour and by hatching, so
that every figure can be read without colours too. The colours are those of Okabe and Ito (2008),
https://jfly.uni-koeln.de/color/, which differ in lightness and for colour-blind eyes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from horovod_lm.utils.metrics import PARTS_OF_A_STEP

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Rows]
Series = tuple[list[int], list[float]]  # steps and values

BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000"
# How runs differ: colour, line style, line width, marker. Runs may lie exactly over each other, so
# the first one is wide and each next one leaves gaps.
RUN_STYLES = (
    (BLUE, "-", 3.6, "o"),
    (ORANGE, "--", 1.8, "s"),
    (GREEN, "-.", 1.5, "^"),
    (PINK, ":", 1.5, "D"),
)
ALONE = (BLUE, "-", 1.6, "o")
# How the parts of a step differ: (colour, hatching), in the order in which they happen.
PART_STYLES = ((BLACK, ""), (BLUE, "//"), (GREEN, ".."), (ORANGE, "xx"), (PINK, "\\\\"))
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


def plot_loss(runs: Runs, title: str = "Loss", levels: Mapping[str, float] | None = None) -> Plot:
    """Draw training and validation loss over the steps.

    Args:
        runs: name of a run -> its rows, of the phases `train` and `validation`.
        title: the figure's title.
        levels: horizontal lines to compare with: label -> nats per token.

    Returns:
        The figure; runs lie over each other.
    """
    plot = Plot(f"{title}: training and validation loss over the steps of {_names(runs)}")
    draw_loss(plot.add_subplot(), runs, title, levels)
    return plot


def draw_loss(
    axes: Axes, runs: Runs, title: str, levels: Mapping[str, float] | None = None
) -> None:
    """Draw what `plot_loss` shows into one panel."""
    for (name, rows), (colour, line, width, marker) in _styled(runs):
        of_run = f", {name}" if len(runs) > 1 else ""
        points = _series(rows, "train", "loss")
        _draw_noisy(axes, points, line, colour, width, f"training{of_run}")
        steps, losses = _series(rows, "validation", "loss")
        if steps:
            axes.plot(
                steps, losses, marker, color=BLACK, markerfacecolor=colour, markersize=6,
                label=f"validation{of_run}",
            )  # fmt: skip
    for label, value in (levels or {}).items():
        axes.axhline(value, color="0.45", linestyle=(0, (6, 3)), linewidth=1, label=label)
    _label(axes, title, STEPS, "loss (nats per token)")
    axes.legend(frameon=False)


def plot_speed(runs: Runs, title: str = "Learning rate and speed") -> Plot:
    """Draw the learning rate, and the tokens per second of all ranks, over the steps.

    Args:
        runs: name of a run -> its rows; those of the phase `train` count.
        title: the figure's title.
    """
    plot = Plot(f"{title}: learning rate, and tokens per second, over the steps of {_names(runs)}")
    left, right = plot.subplots(1, 2)
    plot.suptitle(title)
    for (name, rows), (colour, line, width, _) in _styled(runs):
        rates = _series(rows, "train", "learning_rate")
        left.plot(*rates, line, color=colour, linewidth=width, label=name)
        speeds = _series(rows, "train", "tokens_per_second")
        _draw_noisy(right, speeds, line, colour, width, name)
    _label(left, "", STEPS, "learning rate (per step)")
    _label(right, "", STEPS, "speed (tokens per second)")
    left.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylim(bottom=0)
    if len(runs) > 1:
        right.legend(frameon=False)
    return plot


def plot_step_parts(runs: Runs, title: str = "Where the time of a step goes") -> Plot:
    """Draw the parts of a step as stacked bars, one bar for each run.

    A part is as long as its median over the steps: the first steps, and those that something else
    on the machine disturbed, do not count for more than one.

    Args:
        runs: name of a run -> its rows; those of the phase `train` count.
        title: the figure's title.
    """
    plot = Plot(f"{title}: milliseconds of each part of a step in {_names(runs)}", height=2.6)
    axes = plot.add_subplot()
    ends = [0.0] * len(runs)
    for part, (colour, hatch) in zip(PARTS_OF_A_STEP, PART_STYLES, strict=True):
        widths = [1000 * median(_series(rows, "train", part)[1]) for rows in runs.values()]
        axes.barh(
            list(runs), widths, left=ends, color=colour, hatch=hatch, edgecolor="white",
            height=0.55, label=f"{part.removeprefix('seconds_')} {_list(widths)}",
        )  # fmt: skip
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    _label(axes, title, "milliseconds per step, median over the steps", "")
    axes.invert_yaxis()  # the first run on top
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=5, frameon=False, fontsize=8)
    return plot


def plot_summary(rows: Rows, prompt: str, continuation: str, title: str) -> Plot:
    """Draw a run in one picture: its loss on the left, what it writes on the right.

    Args:
        rows: the rows of one run.
        prompt: what the model was given; shown in bold.
        continuation: what it wrote.
        title: the figure's title.
    """
    plot = Plot(f"{title}: the loss of the run, and a text that the model wrote", width=10)
    left, right = plot.subplots(1, 2, width_ratios=(1, 1.15))
    plot.suptitle(title, fontweight="bold")
    draw_loss(left, {"": rows}, "it learns")
    _label(right, "it writes", "", "")
    right.set(xticks=[], yticks=[])
    right.spines[["left", "bottom"]].set_visible(False)
    _write(right, prompt, continuation)
    return plot


def _write(axes: Axes, prompt: str, continuation: str, columns: int = 58, lines: int = 17) -> None:
    """Write a text into a panel, cut to what it holds; what was given is bold, what follows not."""
    shown = [line[:columns] for line in (prompt + continuation).split("\n")[:lines]]
    given = prompt.count("\n")
    # Two texts over each other, each with spaces where the other one has letters.
    bold = [*prompt.split("\n"), *[""] * lines][: len(shown)]
    plain = [
        line if number > given else " " * len(bold[number]) + line[len(bold[number]) :]
        for number, line in enumerate(shown)
    ]
    for text, weight, colour in ((bold, "bold", BLUE), (plain, "normal", BLACK)):
        axes.text(
            0.02, 0.97, "\n".join(text), transform=axes.transAxes, family="monospace", fontsize=9,
            weight=weight, color=colour, verticalalignment="top", parse_math=False,
        )  # fmt: skip


def _draw_noisy(
    axes: Axes, points: Series, line: str, colour: str, width: float, label: str
) -> None:
    """Draw a value of each step; where there are many, faintly under their running median."""
    steps, values = points
    reach = len(values) // 60  # steps to either side; none in a run of few steps
    if reach:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        values = [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
        label = f"{label} (median of {2 * reach + 1} steps)"
    axes.plot(steps, values, line, color=colour, linewidth=width, label=label)


def _series(rows: Rows, phase: str, column: str) -> Series:
    """Return the steps and the values of a column in one phase."""
    chosen = [row for row in rows if row["phase"] == phase and column in row]
    return [row["step"] for row in chosen], [row[column] for row in chosen]


def _styled(runs: Runs) -> Iterator[tuple[tuple[str, Rows], tuple[str, str, float, str]]]:
    """Return each run, as (name, rows), with its style."""
    if not 0 < len(runs) <= len(RUN_STYLES):
        raise ValueError(f"a figure shows 1 to {len(RUN_STYLES)} runs, not {len(runs)}")
    styles = [ALONE] if len(runs) == 1 else RUN_STYLES[: len(runs)]
    return zip(runs.items(), styles, strict=True)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    if x == STEPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _names(runs: Runs) -> str:
    return " and ".join(name or "one run" for name in runs)


def _list(milliseconds: Sequence[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in milliseconds) + " ms"
