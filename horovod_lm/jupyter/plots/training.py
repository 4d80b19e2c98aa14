"""Figures of training runs, from the rows of `read_metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from horovod_lm.jupyter.plots.charts import (
    BLACK,
    BLUE,
    ORANGE,
    STEPS,
    Plot,
    Rows,
    Runs,
    draw_bars,
    label_axes,
    label_rows,
    with_run_styles,
)
from horovod_lm.training.metrics import PARTS_OF_A_STEP

Points = tuple[list[int], list[float]]  # steps and values

METRICS = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "tokens_per_second": "speed (tokens per second)",
}
MAX_MEDIANS = 600  # approximate number of points of a running median
LEVEL_DASHES = ((6, 3), (1, 2), (6, 2, 1, 2))
PANELS_IN_A_ROW = 3
STEPS_BEFORE_RESUMING = 6  # that a figure of resumed runs shows
TEXT_COLUMNS, TEXT_LINES = 64, 17


def plot_loss(runs: Runs, title: str = "Loss", levels: Mapping[str, float] | None = None) -> Plot:
    """Draw training and validation loss over the steps; `plot_metrics` explains the arguments."""
    return plot_metrics(runs, title, ["loss"], levels)


def plot_metrics(
    runs: Runs,
    title: str,
    columns: Sequence[str] = ("learning_rate", "tokens_per_second"),
    levels: Mapping[str, float] | None = None,
) -> Plot:
    """Draw columns of a run's metrics over the steps, one panel for each.

    Args:
        runs: name of a run (1 to 4) -> its rows.
        title: the figure's title.
        columns: of `METRICS`. The speed is that of all ranks together.
        levels: label -> nats per token of a horizontal line to compare losses with.
    """
    what = ", ".join(METRICS[column] for column in columns)
    plot = Plot(f"{title}: {what} over the steps of {' and '.join(runs)}", width=7.0 + len(columns))
    widths = [2 if column == "loss" else 1 for column in columns]
    panels = plot.subplots(1, len(columns), width_ratios=widths, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        if column == "loss":
            draw_loss(axes, runs, "", levels)
        else:
            _draw_metric(axes, runs, column)
        if len(columns) > 2:
            axes.locator_params(axis="x", nbins=4)  # the panels are narrow
    if len(runs) > 1:
        panels[-1].legend(frameon=False)
    plot.suptitle(title)
    return plot


def draw_loss(
    axes: Axes, runs: Runs, title: str, levels: Mapping[str, float] | None = None
) -> None:
    """Draw the losses of runs into one panel."""
    for (name, rows), (colour, line, width, marker) in with_run_styles(runs):
        of_run = f", {name}" if len(runs) > 1 else ""
        _draw_noisy(axes, _points(rows, "loss"), line, colour, width, f"training{of_run}")
        steps, losses = _points(rows, "loss", "validation")
        if steps:
            axes.plot(
                steps, losses, marker, color=BLACK, markerfacecolor=colour, markersize=6,
                label=f"validation{of_run}",
            )  # fmt: skip
    for (label, value), dashes in zip((levels or {}).items(), cycle(LEVEL_DASHES), strict=False):
        axes.axhline(value, color="0.45", linestyle=(0, dashes), linewidth=1, label=label)
    label_axes(axes, title, STEPS, METRICS["loss"])
    axes.legend(frameon=False)


def _draw_metric(axes: Axes, runs: Runs, column: str) -> None:
    for (name, rows), (colour, line, width, _) in with_run_styles(runs):
        _draw_noisy(axes, _points(rows, column), line, colour, width, name)
    label_axes(axes, "", STEPS, METRICS[column])
    axes.set_ylim(bottom=0)
    if column == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    else:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def plot_step_parts(runs: Runs, title: str = "Where the time of a step goes") -> Plot:
    """Draw the parts of a step as stacked bars, one bar for each run.

    A part's length is its median over the steps, so that slow first steps and disturbances of the
    machine do not count.

    Args:
        runs: name of a run -> its rows.
        title: the figure's title.
    """
    parts = {}
    for part in PARTS_OF_A_STEP:
        times = [1000 * median(_points(rows, part)[1]) for rows in runs.values()]
        values = " / ".join(f"{value:.0f}" for value in times)
        parts[f"{part.removeprefix('seconds_')} {values} ms"] = times
    plot = Plot(
        f"{title}: milliseconds of each part of a step in {' and '.join(runs)}",
        height=1.5 + 0.38 * len(runs),
    )
    axes = plot.add_subplot()
    draw_bars([axes], parts, "stacked")
    label_axes(axes, title, "milliseconds per step, median over the steps", "")
    label_rows(axes, list(runs))
    # Each label lists the milliseconds of all runs: with three runs, five labels are too wide.
    columns = 5 if len(runs) < 3 else 3
    plot.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return plot


def plot_summary(rows: Rows, prompt: str, continuation: str, title: str) -> Plot:
    """Draw the loss of a run on the left, and a text that the model wrote on the right.

    Args:
        rows: the rows of one run.
        prompt: the prompt; shown in bold.
        continuation: the generated text.
        title: the figure's title.
    """
    plot = Plot(f"{title}: the loss of the run, and a text that the model wrote", width=10)
    left, right = plot.subplots(1, 2, width_ratios=(1, 1.15))
    plot.suptitle(title, fontweight="bold")
    draw_loss(left, {"": rows}, "it learns")
    right.set_title("it writes")
    right.set_axis_off()
    _write_text(right, prompt, continuation)
    return plot


def _write_text(axes: Axes, prompt: str, continuation: str) -> None:
    """Write a text into a panel, cut to the panel's size."""
    shown = [
        line if len(line) <= TEXT_COLUMNS else f"{line[: TEXT_COLUMNS - 1]}…"
        for line in (prompt + continuation).split("\n")[:TEXT_LINES]
    ]
    n_prompt_lines = prompt.count("\n")
    # Two texts over each other: the prompt, and the rest with spaces in the prompt's place.
    bold = [*prompt.split("\n"), *[""] * TEXT_LINES][: len(shown)]
    plain = [
        line if number > n_prompt_lines else " " * len(bold[number]) + line[len(bold[number]) :]
        for number, line in enumerate(shown)
    ]
    for text, weight, colour in ((bold, "bold", BLUE), (plain, "normal", BLACK)):
        axes.text(
            0.02, 0.97, "\n".join(text), transform=axes.transAxes, family="monospace", fontsize=9,
            weight=weight, color=colour, verticalalignment="top", parse_math=False,
        )  # fmt: skip


def plot_resumed_runs(
    whole: Sequence[float], resumed: Mapping[str, Sequence[float]], title: str
) -> Plot:
    """Draw the loss of resumed runs, each in a panel beside the run that was never interrupted.

    A panel begins a few steps before the run was resumed; the area between the curves is shaded.

    Args:
        whole: the loss of each step of the uninterrupted run, from step 1 on, in nats per token.
        resumed: name -> the losses of a resumed run that ends at the same step.
        title: the figure's title.

    Raises:
        ValueError: there is no resumed run, or one has more steps than the uninterrupted run.
    """
    if not resumed or any(len(losses) > len(whole) for losses in resumed.values()):
        raise ValueError("at least one run is needed, each of them the end of the whole run")
    n_rows = -(-len(resumed) // PANELS_IN_A_ROW)
    names = ", ".join(resumed)
    plot = Plot(f"{title}: loss over the steps, uninterrupted and {names}", 9.0, 0.6 + 2.3 * n_rows)
    plot.suptitle(title)
    columns = min(PANELS_IN_A_ROW, len(resumed))
    panels = list(plot.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (name, losses) in zip(panels, resumed.items(), strict=False):
        start = len(whole) - len(losses)
        first = max(0, start - STEPS_BEFORE_RESUMING)
        steps = range(1, len(whole) + 1)
        axes.fill_between(steps[start:], whole[start:], losses, color="0.8", label="difference")
        axes.plot(steps[first:], whole[first:], color=BLUE, linewidth=3, label="never interrupted")
        axes.plot(steps[start:], losses, "--", color=ORANGE, linewidth=1.8, label="resumed")
        _mark_step(axes, start + 0.5)
        label_axes(axes, name, STEPS, METRICS["loss"])
        axes.label_outer()
    for axes in panels[len(resumed) :]:
        axes.set_axis_off()
    panels[0].legend(frameon=False, fontsize=8)
    return plot


def plot_world_size(rows: Rows, title: str) -> Plot:
    """Draw the loss of an elastic run, and under it the number of ranks at each step.

    Args:
        rows: the rows of one run.
        title: the figure's title.
    """
    plot = Plot(f"{title}: training loss and number of ranks over the steps", height=4.6)
    above, below = plot.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_loss(above, {"": rows}, title)
    above.legend(facecolor="white", edgecolor="none", framealpha=1)  # hides the vertical lines
    above.set_xlabel("")
    steps, sizes = _points(rows, "world_size")
    below.fill_between(steps, sizes, step="mid", color=ORANGE, linewidth=0)
    below.step(steps, sizes, where="mid", color=BLACK, linewidth=1.2)
    for before, after, step in zip(sizes, sizes[1:], steps[1:], strict=False):
        if before != after:
            _mark_step(above, step - 0.5)
            _mark_step(below, step - 0.5)
    label_axes(below, "", STEPS, "ranks")
    below.set_ylim(0, max(sizes) + 0.4)
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    return plot


def _mark_step(axes: Axes, step: float) -> None:
    axes.axvline(step, color=BLACK, linestyle=":", linewidth=1)


def _draw_noisy(
    axes: Axes, points: Points, line: str, colour: str, width: float, label: str
) -> None:
    """Draw a value of each step; a long series faintly, under its running median."""
    steps, values = points
    reach = len(values) // 60  # steps to either side; none in a run of few steps
    if reach:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        # A long run has more steps than a picture has columns.
        places = range(0, len(values), max(1, len(values) // MAX_MEDIANS))
        values = [median(values[max(0, i - reach) : i + reach + 1]) for i in places]
        steps = [steps[i] for i in places]
        label = f"{label} (median of {2 * reach + 1} steps)"
    axes.plot(steps, values, line, color=colour, linewidth=width, label=label)


def _points(rows: Rows, column: str, phase: str = "train") -> Points:
    """Return the steps and the values of a column in one phase."""
    chosen = [row for row in rows if row["phase"] == phase and column in row]
    return [row["step"] for row in chosen], [row[column] for row in chosen]
