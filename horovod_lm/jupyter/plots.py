"""Every figure of the course, and the class `Plot` that they are.

`title` is the title of a figure, or of a panel. Labels of axes name the unit.
Lines and bars also differ by line style or hatching, for greyscale. The colours are those of Okabe
and Ito (2008), https://jfly.uni-koeln.de/color/, which are safe for colour-blind readers.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from horovod_lm.analysis.ring import RingState
from horovod_lm.analysis.scaling import Job, Measurement, Network, breaking_point, curve
from horovod_lm.analysis.timeline import NEGOTIATION, REDUCTION, Span
from horovod_lm.training.metrics import PARTS_OF_A_STEP

Rows = Sequence[Mapping[str, Any]]  # of metrics.csv
Runs = Mapping[str, Rows]
Values = Iterable[float]  # or a tensor of one dimension

BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000"
# Colour, line style, line width, marker, for 1 to 4 lines. Lines may coincide, so the first one is
# wide and each next one is thinner and has gaps.
LINE_STYLES = (
    (BLUE, "-", 3.6, "o"),
    (ORANGE, "--", 1.8, "s"),
    (GREEN, "-.", 1.5, "^"),
    (PINK, ":", 1.5, "D"),
)
SINGLE_LINE = (BLUE, "-", 1.6, "o")
# Colour and hatching, for 1 to 5 series. Neighbours differ in lightness, too.
BAR_STYLES = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (PINK, "xx"), (BLACK, ""))
DOTS_PER_INCH = 110
STEPS = "optimizer step"


class Plot(Figure):
    """A figure that a notebook displays, with a fixed text for readers without the picture.

    It is rendered by Agg without pyplot, so it needs no window and no `close()`.

    Args:
        description: what the figure shows.
        width, height: inches.
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

    _repr_png_ = png  # called by Jupyter

    def save(self, path: str | Path) -> Path:
        """Write the picture to a PNG file, create its folder, and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png())
        return path


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set a panel's title, axis labels and grid lines; only vertical ones without a `y`."""
    axes.set(title=title, xlabel=x, ylabel=y)
    if x == STEPS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="both" if y else "x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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
        log_x: a logarithmic x axis of base 2, with a tick at each x value.
        log_y: a logarithmic y axis; otherwise it begins at 0.
        marks: label -> the x value of a vertical line.
    """
    plot = Plot(f"{title}: {y_label} over {x_label}, {' and '.join(lines)}")
    axes = plot.add_subplot()
    for (name, y), (colour, line, width, marker) in zip(lines.items(), cycle(LINE_STYLES)):
        width = min(width, 2.4)
        axes.plot(x, y, line, color=colour, lw=width, marker=marker, markersize=5, label=name)
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
    series: Mapping[str, Values],
    title: str,
    label: str,
    *,
    layout: str = "grouped",
    levels: Mapping[str, float] | None = None,
) -> Plot:
    """Draw horizontal bars in 1 to 5 colours.

    Args:
        rows: the labels of the rows, from top to bottom.
        series: name -> a value for each row.
        label: what the values are.
        layout: "grouped": the bars of a row one below the other, each with its value; "stacked":
            end to end; "panels": each series in a panel of its own.
        levels: label -> the value of a vertical line to compare with.
    """
    is_grouped, has_panels = layout == "grouped", layout == "panels"
    space = 0.12 + 0.2 * (len(series) if is_grouped else 1)  # inches of a row
    plot = Plot(
        f"{title}: {label} of {' and '.join(series)}, {len(rows)} rows",
        height=1.5 + (0.45 if layout == "stacked" else space) * len(rows),
    )
    n_panels = len(series) if has_panels else 1
    panels = plot.subplots(1, n_panels, sharex=True, sharey=True, squeeze=False)[0]
    height = 0.8 / len(series) if is_grouped else 0.7
    ends = np.zeros(len(rows))
    for number, ((name, values), style) in enumerate(zip(series.items(), cycle(BAR_STYLES))):
        axes = panels[number if has_panels else 0]
        widths = np.array([float(value) for value in values])
        offset = height * (number - (len(series) - 1) / 2) if is_grouped else 0.0
        bars = axes.barh(
            np.arange(len(rows)) + offset, widths, height, left=ends, color=style[0],
            hatch=style[1], edgecolor="white", label=name if len(series) > 1 else None,
        )  # fmt: skip
        if layout == "stacked":
            ends = ends + widths
        elif is_grouped:
            axes.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=3)
            axes.margins(x=0.1)  # space for the numbers
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    panels[0].tick_params(axis="y", length=0)
    for axes, name in zip(panels, series, strict=False):
        label_axes(axes, name if has_panels else title, label, "")
        for level, value in (levels or {}).items():
            axes.axvline(value, color=BLACK, linestyle="--", linewidth=1.6, label=level)
    if has_panels:
        plot.suptitle(title)
    elif len(series) > 1 or levels:
        plot.legend(loc="outside lower center", ncols=3, frameon=False)
    return plot


# ---- training runs -------------------------------------------------------------------------------

METRICS = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "tokens_per_second": "speed (tokens per second)",
}
MAX_MEDIANS = 600  # approximate number of points of a running median
LEVEL_DASHES = ((6, 3), (1, 2), (6, 2, 1, 2))
RUNS_IN_A_ROW = 3
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
        columns: of `METRICS`. The speed is that of all ranks together.
        levels: label -> nats per token of a horizontal line to compare losses with.
    """
    what = ", ".join(METRICS[column] for column in columns)
    plot = Plot(f"{title}: {what} over the steps of {' and '.join(runs)}", width=7.0 + len(columns))
    widths = [2 if column == "loss" else 1 for column in columns]
    panels = plot.subplots(1, len(columns), width_ratios=widths, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        _draw_metric(axes, runs, column, levels)
        if len(columns) > 2:
            axes.locator_params(axis="x", nbins=4)  # the panels are narrow
    if len(runs) > 1:
        panels[-1].legend(frameon=False)
    plot.suptitle(title)
    return plot


def _draw_metric(
    axes: Axes, runs: Runs, column: str, levels: Mapping[str, float] | None = None
) -> None:
    """Draw one column of runs into a panel; the loss also at validation, and over its levels."""
    is_loss, styles = column == "loss", [SINGLE_LINE] if len(runs) == 1 else LINE_STYLES
    for (name, rows), (colour, line, width, marker) in zip(runs.items(), cycle(styles)):
        of_run = f", {name}" if len(runs) > 1 else ""
        style = {"linestyle": line, "color": colour, "linewidth": width}
        _draw_noisy(axes, _points(rows, column), style, f"training{of_run}" if is_loss else name)
        steps, losses = _points(rows, "loss", "validation")
        if is_loss and steps:
            look: dict[str, Any] = {"color": BLACK, "markerfacecolor": colour, "markersize": 6}
            axes.plot(steps, losses, marker, label=f"validation{of_run}", **look)
    label_axes(axes, "", STEPS, METRICS[column])
    if is_loss:
        for (label, level), dashes in zip((levels or {}).items(), cycle(LEVEL_DASHES)):
            axes.axhline(level, color="0.45", linestyle=(0, dashes), linewidth=1, label=label)
        axes.legend(frameon=False)
        return
    axes.set_ylim(bottom=0)
    if column == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    else:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def plot_step_parts(runs: Runs, title: str = "Where the time of a step goes") -> Plot:
    """Draw the parts of a step as stacked bars, one bar for each run.

    A part's length is its median over the steps: slow first steps do not count.
    """
    parts = {}
    for part in PARTS_OF_A_STEP:
        times = [1000 * median(_points(rows, part)[1] or [math.nan]) for rows in runs.values()]
        values = " / ".join(f"{value:.0f}" for value in times)
        parts[f"{part.removeprefix('seconds_')} {values} ms"] = times
    label = "milliseconds per step, median over the steps"
    plot = plot_bars(list(runs), parts, title, label, layout="stacked")
    # Without the measured times, which differ at every execution.
    plot.description = f"{title}: milliseconds of each part of a step in {' and '.join(runs)}"
    return plot


def plot_summary(rows: Rows, prompt: str, continuation: str, title: str) -> Plot:
    """Draw the loss of a run on the left, and on the right a text that the model wrote.

    The prompt is bold; long lines are cut.
    """
    plot = Plot(f"{title}: the loss of the run, and a text that the model wrote", width=10)
    left, right = plot.subplots(1, 2, width_ratios=(1, 1.15))
    plot.suptitle(title, fontweight="bold")
    _draw_metric(left, {"": rows}, "loss")
    left.set_title("it learns")
    right.set_title("it writes")
    right.set_axis_off()
    lines = (prompt + continuation).split("\n")[:TEXT_LINES]
    cut = [f"{one[: TEXT_COLUMNS - 1]}…" if len(one) > TEXT_COLUMNS else one for one in lines]
    text, n = "\n".join(cut), len(prompt)
    # Two texts at one place: the second has spaces in place of the prompt.
    rest = re.sub(r"[^\n]", " ", text[:n]) + text[n:]
    for words, weight, colour in ((text[:n], "bold", BLUE), (rest, "normal", BLACK)):
        right.text(
            0.02, 0.97, words, transform=right.transAxes, family="monospace", fontsize=9,
            weight=weight, color=colour, verticalalignment="top", parse_math=False,
        )  # fmt: skip
    return plot


def plot_resumed_runs(
    whole: Sequence[float], resumed: Mapping[str, Sequence[float]], title: str
) -> Plot:
    """Draw the loss of resumed runs, each in a panel beside the run that was never interrupted.

    A panel begins a few steps before the run was resumed; the area between the curves is shaded.

    Args:
        whole: the loss of each step of the uninterrupted run, from step 1 on, in nats per token.
        resumed: name -> the losses of a resumed run that ends at the same step.
    """
    n_rows = -(-len(resumed) // RUNS_IN_A_ROW)
    names = ", ".join(resumed)
    plot = Plot(f"{title}: loss over the steps, uninterrupted and {names}", 9.0, 0.6 + 2.3 * n_rows)
    plot.suptitle(title)
    columns = min(RUNS_IN_A_ROW, len(resumed))
    panels = plot.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).flat
    steps = range(1, len(whole) + 1)
    for axes, (name, losses) in zip(panels, resumed.items(), strict=False):
        start = len(whole) - len(losses)
        first = max(0, start - STEPS_BEFORE_RESUMING)
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
    """Draw the loss of one elastic run, and under it the number of ranks at each step."""
    plot = Plot(f"{title}: training loss and number of ranks over the steps", height=4.6)
    above, below = plot.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_metric(above, {"": rows}, "loss")
    above.set_title(title)
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
    below.set_ylim(0, max(sizes, default=1) + 0.4)
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    return plot


def _mark_step(axes: Axes, step: float) -> None:
    axes.axvline(step, color=BLACK, linestyle=":", linewidth=1)


def _draw_noisy(
    axes: Axes, points: tuple[list[int], list[float]], style: dict[str, Any], label: str
) -> None:
    """Draw a value of each step; a long series faintly, under its running median."""
    steps, values = points
    reach = len(values) // 60  # steps to either side; none in a run of few steps
    if reach:
        axes.plot(steps, values, color=style["color"], linewidth=0.7, alpha=0.35)
        # A long run has more steps than a picture has columns.
        places = range(0, len(values), max(1, len(values) // MAX_MEDIANS))
        values = [median(values[max(0, i - reach) : i + reach + 1]) for i in places]
        steps = [steps[i] for i in places]
        label = f"{label} (median of {2 * reach + 1} steps)"
    axes.plot(steps, values, label=label, **style)


def _points(rows: Rows, column: str, phase: str = "train") -> tuple[list[int], list[float]]:
    """Return the steps and the values of a column in one phase."""
    chosen = [row for row in rows if row["phase"] == phase and column in row]
    return [row["step"] for row in chosen], [row[column] for row in chosen]


# ---- tables of shaded cells ----------------------------------------------------------------------

PAGE_WIDTH, SMALLEST_MAP, LARGEST_MAP = 8.0, 1.3, 2.0  # inches
MAX_WORDS_WITH_NUMBERS = 10  # a map of more words has no space for a number in each cell
STEPS_IN_A_ROW = 4
RANK_SHADES = ("#FFFFFF", "#F0E442", "#56B4E9", "#0072B2")  # Okabe and Ito, from light to dark


def plot_attention(
    weights: Tensor | Mapping[str, Tensor],
    words: Sequence[str],
    title: str,
    x_label: str = "word looked at (key)",
    y_label: str = "word that looks (query)",
    label: str = "weight",
) -> Plot:
    """Draw attention weights, or another table of words by words; darker is more.

    Each cell of a small table holds its number; larger tables have a colour bar.

    Args:
        weights: (T, T), a row for each query, entries from 0 to 1; or name -> (T, T), one panel
            for each.
        words: the T words.
        x_label, y_label, label: what a column, a row and an entry are.
    """
    maps = {"": weights} if isinstance(weights, Tensor) else weights
    names = "".join(f", {name}" for name in maps if name)
    numbered = len(words) <= MAX_WORDS_WITH_NUMBERS
    side = 3.6 if numbered else 0.24 * len(words)  # inches
    plot = Plot(f"{title}: {len(words)} words{names}", 2 + (side + 0.4) * len(maps), side + 1.4)
    plot.set_layout_engine("compressed")  # for panels of equal aspect
    panels = plot.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (name, one) in zip(panels, maps.items(), strict=True):
        rows = one.tolist()
        texts = [[f"{weight:.2f}" for weight in row] for row in rows] if numbered else []
        image = _draw_cells(axes, rows, texts, vmax=1, dark_from=0.5)
        axes.set(title=name or title, xlabel=x_label)
        axes.set_xticks(range(len(words)), words, rotation=0 if numbered else 90)
        axes.set_yticks(range(len(words)), words)
    panels[0].set_ylabel(y_label)
    if not numbered:
        plot.colorbar(image, ax=panels, shrink=0.7, label=label)
    if names:
        plot.suptitle(title)
    return plot


def plot_all_heads(weights: Tensor, entropy_bits: Tensor, title: str) -> Plot:
    """Draw a small map of every head, a row for each layer, with its entropy above it.

    Args:
        weights: (L, H, T, T).
        entropy_bits: (L, H), the mean entropy of a head's rows in bits.
    """
    n_layers, n_heads = weights.shape[:2]
    side = min(max(PAGE_WIDTH / n_heads, SMALLEST_MAP), LARGEST_MAP)  # inches
    layers = f"{n_layers} layer{'s' if n_layers > 1 else ''}"
    plot = Plot(
        f"{title}: {layers} of {n_heads} heads", side * n_heads, 0.5 + (side + 0.1) * n_layers
    )
    for layer, panels in enumerate(plot.subplots(n_layers, n_heads, squeeze=False)):
        for head, axes in enumerate(panels):
            _draw_cells(axes, weights[layer, head].tolist(), vmax=1)
            axes.set(xticks=[], yticks=[])
            bits = entropy_bits[layer, head].item()
            axes.set_title(f"{layer + 1}.{head + 1}: {bits:.2f} bit", fontsize=8)
    plot.suptitle(f"{title} (layer.head: entropy; darker is more)", fontsize=9)
    return plot


def plot_shards(panels: Mapping[str, Sequence[Sequence[int]]], title: str) -> Plot:
    """Draw which rank reads which sample in which epoch.

    Args:
        panels: name -> a row for each epoch: the rank, 0 to 3, that reads each sample.
    """
    tables = np.array(list(panels.values()))  # panels x epochs x samples
    _, n_epochs, n_samples = tables.shape
    plot = Plot(
        f"{title}: {tables.max() + 1} ranks, {n_samples} samples, {n_epochs} epochs,"
        f" {' and '.join(panels)}",
        height=0.8 + len(panels) * (0.9 + 0.26 * n_epochs),
    )
    subplots = plot.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (name, rows) in zip(subplots, panels.items(), strict=True):
        texts = [map(str, row) for row in rows]
        shades = ListedColormap(RANK_SHADES)
        _draw_cells(axes, rows, texts, dark_from=2, cmap=shades, vmax=3, aspect="auto")
        for sample, epoch in np.ndindex(n_samples, n_epochs):
            _frame(axes, sample, epoch, 0.5, edgecolor="0.4", linewidth=0.5)
        axes.set(title=name, xlabel="sample (number)", ylabel="epoch")
        axes.set(xticks=range(n_samples), yticks=range(n_epochs))
        axes.tick_params(length=0)
    plot.suptitle(title)
    return plot


def name_of_sum(contributors: frozenset[int], chunk: int, workers: int) -> str:
    """Return the short name of the sum of some workers' chunks: "2", "2+3", "4 of 8", or "all".

    The names begin with the worker where the chunk's way round the ring begins; that worker has
    the chunk's number.
    """
    if len(contributors) == workers:
        return "all"
    if len(contributors) > 3:
        return f"{len(contributors)} of {workers}"
    return "+".join(map(str, sorted(contributors, key=lambda worker: (worker - chunk) % workers)))


def plot_ring_steps(states: Sequence[RingState], title: str = "") -> Plot:
    """Draw which workers' numbers are summed in each worker's chunks, one panel for each step.

    The darker a cell, the more numbers are in its sum; a thick frame marks a chunk that has just
    arrived. `states` is the result of `ring_allreduce`.
    """
    n = states[0].workers
    title = title or f"A ring of {n} workers sums its chunks"
    columns = min(STEPS_IN_A_ROW, len(states))
    rows = -(-len(states) // columns)
    plot = Plot(
        f"{title}: whose numbers each of {n} workers holds after each of {len(states) - 1} steps",
        width=0.6 + columns * (0.8 + 0.4 * n),
        height=0.7 + rows * (0.8 + 0.28 * n),
    )
    panels = plot.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in panels[len(states) :]:
        axes.set_visible(False)
    for number, (axes, state) in enumerate(zip(panels, states, strict=False)):
        shares = [[len(whose) / n for whose in held] for held in state.holds]
        names = [[name_of_sum(one, c, n) for c, one in enumerate(held)] for held in state.holds]
        _draw_cells(axes, shares, names, fontsize=8, vmax=2.2, aspect="auto")
        for message in state.messages:
            _frame(axes, message.chunk, message.receiver, 0.46, linewidth=1.8)
        heading = f"step {state.step}: {state.phase}" if state.step else "start"
        axes.set_title(heading, fontsize="medium")
        axes.set(xticks=range(n), yticks=range(n))
        axes.tick_params(length=0, labelbottom=number + columns >= len(states))
    plot.suptitle(title)
    plot.supxlabel("chunk of the data", fontsize="medium")
    plot.supylabel("worker", fontsize="medium")
    return plot


def _draw_cells(
    axes: Axes, rows: Sequence[Sequence[float]], texts: Sequence[Iterable[str]] = (),
    dark_from: float = math.inf, fontsize: float = 10, cmap: Any = "Greys", **look: Any,
) -> AxesImage:  # fmt: skip
    """Draw a shaded cell for each number, with a text in it: white above `dark_from`."""
    for y, line in enumerate(texts):
        for x, text in enumerate(line):
            colour = "white" if rows[y][x] > dark_from else "black"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=fontsize)
    return axes.imshow(rows, cmap=cmap, vmin=0, **look)


def _frame(axes: Axes, x: int, y: int, reach: float, **look: Any) -> None:
    axes.add_patch(Rectangle((x - reach, y - reach), 2 * reach, 2 * reach, fill=False, **look))


# ---- performance ---------------------------------------------------------------------------------

MILLISECONDS = 1000  # in a second
MAX_WORKERS = 4096
# The beginning of a phase's name, label, colour, hatching. The first match counts; what matches no
# other is the transfer itself: GLOO_ALLREDUCE, NCCL_ALLREDUCE ...
PHASES = (
    (NEGOTIATION, "waits until all ranks have it", "0.85", ""),
    (REDUCTION, "waits for its turn", PINK, ".."),
    (("MEMCPY_", "INIT_FUSION_BUFFER"), "copied into or out of the fusion buffer", ORANGE, "//"),
    ("", "travels", BLUE, ""),
)


def plot_timeline(spans: Sequence[Span], title: str = "One step in Horovod's timeline") -> Plot:
    """Draw the phases of each tensor's reduction: a row for each tensor, in order of reduction.

    `spans` are those of one step, as `horovod_lm.analysis.timeline.reduction` returns them.
    """
    starts = {span.tensor: span.start for span in reversed(spans) if span.phase == REDUCTION}
    rows = {tensor: row for row, tensor in enumerate(sorted(starts, key=starts.__getitem__))}
    plot = Plot(f"{title}: what happens to {len(rows)} tensors when", height=4.2)
    axes = plot.add_subplot()
    others = [span for span in spans if span.tensor in rows]
    first = min((span.start for span in others), default=0.0)
    for beginning, label, colour, hatch in PHASES:
        chosen = [span for span in others if span.phase.startswith(beginning)]
        others = [span for span in others if not span.phase.startswith(beginning)]
        if chosen:
            axes.barh(
                [rows[span.tensor] for span in chosen],
                [MILLISECONDS * span.seconds for span in chosen],
                left=[MILLISECONDS * (span.start - first) for span in chosen],
                height=0.9, color=colour, hatch=hatch, edgecolor="white", linewidth=0.1,
                label=label,
            )  # fmt: skip
    label_axes(axes, title, "milliseconds since the first gradient was there", "gradient (number)")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    plot.legend(loc="outside lower center", ncols=2, frameon=False)
    return plot


def plot_allreduces(
    measured: Mapping[str, Sequence[Measurement]],
    networks: Mapping[str, Network],
    title: str = "Time of an allreduce by its size",
) -> Plot:
    """Draw measured allreduces as points and the cost model as lines, both axes logarithmic.

    Args:
        measured: name (1 to 4) -> allreduces of one number of workers, at several sizes.
        networks: the same names -> the link that the cost model assumes.
    """
    plot = Plot(f"{title}: seconds over bytes, {' and '.join(measured)}", height=4)
    axes = plot.add_subplot()
    for (name, rows), (colour, line, _, marker) in zip(measured.items(), cycle(LINE_STYLES)):
        sizes, seconds = [row.size for row in rows], [row.seconds for row in rows]
        _draw_allreduces(axes, networks[name], rows[0].workers, sizes, colour, linestyle=line)
        axes.plot(sizes, seconds, marker, color=colour, markeredgecolor=BLACK, label=name)
    label_axes(axes, title, "size of the message (bytes)", "time (seconds)")
    heading = "points: measured; lines: model"
    axes.legend(edgecolor="none", fontsize=8, title_fontsize=8, title=heading)
    return plot


def _draw_allreduces(
    axes: Axes, network: Network, workers: int, reach: Sequence[float], colour: str,
    label: str | None = None, linestyle: str = "-",
) -> None:  # fmt: skip
    """Draw the cost model from the smallest to the largest size of a reach, on logarithmic axes."""
    sizes = np.geomspace(min(reach), max(reach), 60)  # the model is no straight line there
    seconds = [network.allreduce_seconds(size, workers) for size in sizes]
    axes.plot(sizes, seconds, linestyle, color=colour, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _format_log_seconds(axes)


def plot_scaling(
    job: Job,
    network: Network,
    workers: int,
    workers_per_host: int,
    inside: Network | None,
    threshold: float,
) -> Plot:
    """Draw what the cost model predicts: step time, efficiency, and the time of an allreduce.

    The arguments are those of `horovod_lm.analysis.scaling`; `workers` are the chosen ones, and
    `threshold` is the efficiency, 0 to 1, below which the job does not scale.
    """
    title = "What more workers would do"
    what = "time of a step and efficiency over workers, time of an allreduce over its size"
    plot = Plot(f"{title}: {what}", 11.0, 3.7)
    plot.suptitle(title)
    left, middle, right = plot.subplots(1, 3)
    # Powers of two, and both sides of the point where a second host is needed.
    powers = {2**power for power in range(MAX_WORKERS.bit_length())}
    edge = {workers_per_host, min(workers_per_host + 1, MAX_WORKERS)}
    counts = sorted(powers | edge | {workers})
    steps = curve(job, network, counts, workers_per_host, inside)
    chosen = steps[counts.index(workers)]

    left.plot(counts, [step.seconds for step in steps], color=BLUE, linewidth=2.4, label="step")
    left.axhline(job.seconds_per_step, color=BLACK, linestyle="--", label="arithmetic")
    times = [step.communication or np.nan for step in steps]  # a logarithmic axis has no zero
    left.plot(counts, times, ":", color=ORANGE, linewidth=2, label="allreduce")
    _mark(left, workers, chosen.seconds)
    label_axes(left, "Time of a step", "workers", "time (seconds)")
    _format_log_seconds(left)

    middle.plot(counts, [step.efficiency for step in steps], color=BLUE, linewidth=2.4)
    middle.axhline(threshold, color=BLACK, linestyle="--", label=f"threshold: {threshold:.0%}")
    limit = breaking_point(job, network, workers_per_host, inside, threshold)
    if limit is not None and limit <= counts[-1]:
        label = f"below it from {limit:,} workers on"
        middle.axvline(limit, color=ORANGE, linestyle=":", linewidth=2, label=label)
    _mark(middle, workers, chosen.efficiency, f"{chosen.efficiency:.0%}")
    label_axes(middle, "Efficiency", "workers", "efficiency (% of a worker alone)")
    middle.set_ylim(0, 1.05)
    middle.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 4, 16, 64, 256, 1024, MAX_WORKERS])
        axes.xaxis.set_major_formatter("{x:.0f}")

    nodes, size = -(-workers // workers_per_host), job.bytes_reduced
    x_label = "size of the gradients (bytes)"
    label_axes(right, "One allreduce between nodes", x_label, "time (seconds)")
    if nodes > 1:
        _draw_allreduces(right, network, nodes, [size / 10, size * 10], BLUE, f"{nodes:,} nodes")
        _mark(right, size, network.allreduce_seconds(size, nodes))
    else:
        right.set(xticks=[], yticks=[])
        words = "all workers are on one node:\nnothing crosses the network"
        right.text(0.5, 0.5, words, transform=right.transAxes, ha="center")
    for axes in plot.axes:
        if axes.lines:
            axes.legend(edgecolor="none", fontsize=8)
    return plot


def _mark(axes: Axes, x: float, y: float, value: str = "") -> None:
    axes.plot(
        [x], [y], "o", color="white", markeredgecolor=BLACK, markeredgewidth=2, markersize=9,
        label=f"chosen: {value or EngFormatter('s', 1)(y)}", zorder=5,
    )  # fmt: skip


class _SecondsFormatter(LogFormatter):
    """Formats the ticks of a logarithmic axis as 50 ms instead of 5 x 10^-2."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return EngFormatter("s")(value) if super().__call__(value, position) else ""


def _format_log_seconds(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_SecondsFormatter())
    # Less than two decades may have one major tick: the minor ticks are labelled too.
    axes.yaxis.set_minor_formatter(_SecondsFormatter(minor_thresholds=(2, 0.5)))
