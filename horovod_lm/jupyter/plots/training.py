"""Figures of training: plain functions from the rows of `read_metrics` to a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from horovod_lm.jupyter.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    STEPS,
    Plot,
    Rows,
    Runs,
    label_axes,
    name_runs,
    styled_runs,
)
from horovod_lm.utils.metrics import PARTS_OF_A_STEP

Series = tuple[list[int], list[float]]  # steps and values

# How the parts of a step differ: (colour, hatching), in the order in which they happen.
PART_STYLES = ((BLACK, ""), (BLUE, "//"), (GREEN, ".."), (ORANGE, "xx"), (PINK, "\\\\"))
MOST_MEDIANS = 600  # points of a running median, about
LEVEL_DASHES = ((6, 3), (1, 2), (6, 2, 1, 2))  # how horizontal lines differ


def plot_loss(runs: Runs, title: str = "Loss", levels: Mapping[str, float] | None = None) -> Plot:
    """Draw training and validation loss over the steps.

    Args:
        runs: name of a run -> its rows, of the phases `train` and `validation`.
        title: the figure's title.
        levels: horizontal lines to compare with: label -> nats per token.

    Returns:
        The figure; runs lie over each other.
    """
    plot = Plot(f"{title}: training and validation loss over the steps of {name_runs(runs)}")
    draw_loss(plot.add_subplot(), runs, title, levels)
    return plot


def draw_loss(
    axes: Axes, runs: Runs, title: str, levels: Mapping[str, float] | None = None
) -> None:
    """Draw what `plot_loss` shows into one panel."""
    for (name, rows), (colour, line, width, marker) in styled_runs(runs):
        of_run = f", {name}" if len(runs) > 1 else ""
        points = _series(rows, "train", "loss")
        _draw_noisy(axes, points, line, colour, width, f"training{of_run}")
        steps, losses = _series(rows, "validation", "loss")
        if steps:
            axes.plot(
                steps, losses, marker, color=BLACK, markerfacecolor=colour, markersize=6,
                label=f"validation{of_run}",
            )  # fmt: skip
    for (label, value), dashes in zip((levels or {}).items(), cycle(LEVEL_DASHES), strict=False):
        axes.axhline(value, color="0.45", linestyle=(0, dashes), linewidth=1, label=label)
    label_axes(axes, title, STEPS, "loss (nats per token)")
    axes.legend(frameon=False)


def plot_speed(runs: Runs, title: str = "Learning rate and speed") -> Plot:
    """Draw the learning rate, and the tokens per second of all ranks, over the steps.

    Args:
        runs: name of a run -> its rows; those of the phase `train` count.
        title: the figure's title.
    """
    plot = Plot(
        f"{title}: learning rate, and tokens per second, over the steps of {name_runs(runs)}"
    )
    left, right = plot.subplots(1, 2)
    plot.suptitle(title)
    _draw_rate_and_speed(left, right, runs)
    if len(runs) > 1:
        right.legend(frameon=False)
    return plot


def plot_progress(rows: Rows, name: str, entropy: float | None = None) -> Plot:
    """Draw a run's loss, learning rate and speed so far, side by side.

    Args:
        rows: the rows of one run.
        name: the run's.
        entropy: of the stories, in nats per token: the loss that no model can go below; None where
            it is not known.
    """
    plot = Plot(f"loss, learning rate and speed of {name}", width=10.0, height=3.0)
    loss, rate, speed = plot.subplots(1, 3, width_ratios=(2, 1, 1))
    levels = {"exact entropy of the stories": entropy} if entropy is not None else None
    draw_loss(loss, {name: rows}, name, levels)
    _draw_rate_and_speed(rate, speed, {name: rows})
    for axes in (rate, speed):
        axes.locator_params(axis="x", nbins=4)  # these panels are narrow
    return plot


def _draw_rate_and_speed(left: Axes, right: Axes, runs: Runs) -> None:
    _draw_rates(left, runs, "")
    left.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for (name, rows), (colour, line, width, _) in styled_runs(runs):
        speeds = _series(rows, "train", "tokens_per_second")
        _draw_noisy(right, speeds, line, colour, width, name)
    label_axes(right, "", STEPS, "speed (tokens per second)")
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylim(bottom=0)


def plot_learning_rate(runs: Runs, title: str = "Learning rate") -> Plot:
    """Draw the learning rate of every run over the steps.

    Args:
        runs: name of a run -> its rows; those of the phase `train` count.
        title: the figure's title.
    """
    plot = Plot(f"{title}: learning rate over the steps of {name_runs(runs)}")
    axes = plot.add_subplot()
    _draw_rates(axes, runs, title)
    axes.legend(frameon=False)
    return plot


def plot_step_parts(runs: Runs, title: str = "Where the time of a step goes") -> Plot:
    """Draw the parts of a step as stacked bars, one bar for each run.

    A part is as long as its median over the steps: the first steps, and those that something else
    on the machine disturbed, do not count for more than one.

    Args:
        runs: name of a run -> its rows; those of the phase `train` count.
        title: the figure's title.
    """
    plot = Plot(f"{title}: milliseconds of each part of a step in {name_runs(runs)}", height=2.6)
    axes = plot.add_subplot()
    ends = [0.0] * len(runs)
    for part, (colour, hatch) in zip(PARTS_OF_A_STEP, PART_STYLES, strict=True):
        widths = [1000 * median(_series(rows, "train", part)[1]) for rows in runs.values()]
        axes.barh(
            list(runs), widths, left=ends, color=colour, hatch=hatch, edgecolor="white",
            height=0.55, label=f"{part.removeprefix('seconds_')} {_list(widths)}",
        )  # fmt: skip
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    label_axes(axes, title, "milliseconds per step, median over the steps", "")
    axes.invert_yaxis()  # the first run on top
    axes.grid(axis="y", visible=False)
    # Each entry lists the milliseconds of all runs: from the third on, five of them are too wide.
    plot.legend(
        loc="outside lower center", ncols=5 if len(runs) < 3 else 3, frameon=False, fontsize=8
    )
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
    label_axes(right, "it writes", "", "")
    right.set(xticks=[], yticks=[])
    right.spines[["left", "bottom"]].set_visible(False)
    _write(right, prompt, continuation)
    return plot


def _write(axes: Axes, prompt: str, continuation: str, columns: int = 64, lines: int = 17) -> None:
    """Write a text into a panel, cut to what it holds; what was given is bold, what follows not."""
    shown = [
        line if len(line) <= columns else f"{line[: columns - 1]}…"
        for line in (prompt + continuation).split("\n")[:lines]
    ]
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


def _draw_rates(axes: Axes, runs: Runs, title: str) -> None:
    for (name, rows), (colour, line, width, _) in styled_runs(runs):
        rates = _series(rows, "train", "learning_rate")
        axes.plot(*rates, line, color=colour, linewidth=width, label=name)
    label_axes(axes, title, STEPS, "learning rate (per step)")


def _draw_noisy(
    axes: Axes, points: Series, line: str, colour: str, width: float, label: str
) -> None:
    """Draw a value of each step; where there are many, faintly under their running median."""
    steps, values = points
    reach = len(values) // 60  # steps to either side; none in a run of few steps
    if reach:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        # A long run has more steps than a picture has columns.
        places = range(0, len(values), max(1, len(values) // MOST_MEDIANS))
        values = [median(values[max(0, i - reach) : i + reach + 1]) for i in places]
        steps = [steps[i] for i in places]
        label = f"{label} (median of {2 * reach + 1} steps)"
    axes.plot(steps, values, line, color=colour, linewidth=width, label=label)


def _series(rows: Rows, phase: str, column: str) -> Series:
    """Return the steps and the values of a column in one phase."""
    chosen = [row for row in rows if row["phase"] == phase and column in row]
    return [row["step"] for row in chosen], [row[column] for row in chosen]


def _list(milliseconds: Sequence[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in milliseconds) + " ms"
