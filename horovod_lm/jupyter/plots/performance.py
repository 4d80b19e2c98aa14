"""Figures of performance: what Horovod does when, what messages cost, what more workers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from horovod_lm.jupyter.plots.style import (
    BAR_STYLES,
    BLACK,
    BLUE,
    ORANGE,
    PINK,
    RUN_STYLES,
    Plot,
    label_axes,
    name_rows,
    styled,
)
from horovod_lm.scaling import Measurement, Network
from horovod_lm.timeline import NEGOTIATION, REDUCTION, Span

MILLISECONDS = 1000  # in a second
SIZES_OF_A_CURVE = 60  # enough for a line that bends smoothly
# What a phase is to the reader: (how its name begins, label, colour, hatching). The first one that
# fits counts, and what fits none of them is the sending itself: GLOO_ALLREDUCE, NCCL_ALLREDUCE ...
PHASE_KINDS = (
    (NEGOTIATION, "waits until all ranks have it", "0.85", ""),
    (REDUCTION, "waits for its turn", PINK, ".."),
    ("MEMCPY_", "copied into or out of the fusion buffer", ORANGE, "//"),
    ("INIT_FUSION_BUFFER", "copied into or out of the fusion buffer", ORANGE, "//"),
    ("", "travels", BLUE, ""),
)


def plot_timeline(spans: Sequence[Span], title: str = "One step in Horovod's timeline") -> Plot:
    """Draw what happens to each tensor when: a line for each, in the order of their reductions.

    Args:
        spans: of one step, as `horovod_lm.timeline.reduction` returns them.
        title: the figure's title.
    """
    begins = {span.tensor: span.start for span in reversed(spans) if span.phase == REDUCTION}
    lanes = {tensor: lane for lane, tensor in enumerate(sorted(begins, key=begins.__getitem__))}
    plot = Plot(f"{title}: what happens to {len(lanes)} tensors when", height=4.2)
    axes = plot.add_subplot()
    spans = [span for span in spans if span.tensor in lanes]
    first = min((span.start for span in spans), default=0.0)
    for prefix, label, colour, hatch in PHASE_KINDS:
        chosen = [span for span in spans if _kind(span.phase) == prefix]
        if chosen:
            axes.barh(
                [lanes[span.tensor] for span in chosen],
                [MILLISECONDS * span.seconds for span in chosen],
                left=[MILLISECONDS * (span.start - first) for span in chosen],
                height=0.9, color=colour, hatch=hatch, edgecolor="white", linewidth=0.1,
                label=label,
            )  # fmt: skip
    label_axes(axes, title, "milliseconds since the first gradient was there", "gradient (number)")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()  # the first one on top
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    plot.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False
    )
    return plot


def plot_message_times(
    measured: Mapping[str, Sequence[Measurement]],
    networks: Mapping[str, Network],
    title: str = "An allreduce and its size",
) -> Plot:
    """Draw measured allreduces as points and the cost model as lines, both axes logarithmic.

    Args:
        measured: name (1 to 4) -> allreduces of one number of workers, at several sizes.
        networks: the same names -> what the model takes the link for.
        title: the figure's title.
    """
    plot = Plot(f"{title}: milliseconds over bytes, {' and '.join(measured)}", height=4)
    axes = plot.add_subplot()
    for (name, rows), (colour, line, _, marker) in styled(measured, RUN_STYLES, "links"):
        rows = sorted(rows, key=lambda row: row.size)
        sizes = [row.size for row in rows]
        axes.plot(
            sizes, [MILLISECONDS * row.seconds for row in rows], marker, color=colour, label=name
        )
        # Between the sizes too: straight pieces would not be the model on logarithmic axes.
        between = np.geomspace(sizes[0], sizes[-1], SIZES_OF_A_CURVE)
        modelled = [networks[name].allreduce_seconds(size, rows[0].workers) for size in between]
        axes.plot(between, [MILLISECONDS * one for one in modelled], line, color=colour)
    label_axes(axes, title, "size of the message (bytes)", "time of an allreduce (milliseconds)")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, title="points: measured; lines: model")
    return plot


def plot_settings(
    seconds: Mapping[str, Mapping[str, float]], title: str, what: str = "time of a step"
) -> Plot:
    """Draw a time under several settings as bars in groups.

    Args:
        seconds: name of a series (1 to 5) -> setting -> seconds; the same settings in each.
        title: the figure's title.
        what: what took the time.
    """
    plot = Plot(f"{title}: milliseconds, {' and '.join(seconds)}")
    axes = plot.add_subplot()
    settings = list(next(iter(seconds.values())))
    width = 0.8 / len(seconds)
    for number, ((name, times), (colour, hatch)) in enumerate(
        styled(seconds, BAR_STYLES, "series")
    ):
        places = [group - 0.4 + width * (number + 0.5) for group in range(len(settings))]
        heights = [MILLISECONDS * times[setting] for setting in settings]
        bars = axes.bar(
            places, heights, width, color=colour, hatch=hatch, edgecolor="white", label=name
        )
        axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
    label_axes(axes, title, "", f"{what} (milliseconds)")
    axes.set_xticks(range(len(settings)), settings)
    axes.margins(y=0.12)  # room for the numbers on top
    axes.grid(axis="x", visible=False)
    if len(seconds) > 1:
        axes.legend(frameon=False)
    return plot


def plot_batches(
    batches: Sequence[int],
    seconds: Mapping[str, Sequence[float]],
    boundary: float,
    title: str = "How small may a batch be?",
) -> Plot:
    """Draw the time of a step over the batch, and the batch at which communication is just hidden.

    Args:
        batches: samples per rank.
        seconds: name -> seconds of a step at each batch, 1 to 4 lines.
        boundary: where the model puts the smallest batch, in samples.
        title: the figure's title.
    """
    plot = Plot(f"{title}: milliseconds of a step over the batch, {' and '.join(seconds)}")
    axes = plot.add_subplot()
    for (name, times), (colour, line, width, marker) in styled(seconds, RUN_STYLES, "lines"):
        milliseconds = [MILLISECONDS * one for one in times]
        axes.plot(
            batches, milliseconds, line, color=colour, linewidth=width, marker=marker, label=name
        )
    axes.axvline(
        boundary, color="0.45", linestyle=(0, (6, 3)),
        label=f"smallest batch, derived: {boundary:.1f}",
    )  # fmt: skip
    label_axes(axes, title, "batch of each rank (samples)", "time of a step (milliseconds)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return plot


def plot_efficiency(
    workers: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    title: str = "What more workers would do",
) -> Plot:
    """Draw the efficiency over the number of workers, a line for each network.

    Args:
        workers: how many, ascending.
        panels: name of a panel -> network (1 to 4) -> efficiency, 0 to 1, at each number.
        title: the figure's title.
    """
    names = " and ".join(next(iter(panels.values())))
    plot = Plot(f"{title}: efficiency over workers, {names}, {' and '.join(panels)}", width=9)
    plot.suptitle(title)
    for axes, (panel, lines) in zip(
        plot.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for (name, values), (colour, line, width, marker) in styled(lines, RUN_STYLES, "networks"):
            axes.plot(
                workers, values, line, color=colour, linewidth=min(width, 2), marker=marker,
                markersize=4, label=name,
            )  # fmt: skip
        label_axes(axes, panel, "workers", "")
        axes.set_xscale("log", base=2)
        axes.set_xticks(workers[::2], [str(count) for count in workers[::2]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, 1.05)
    plot.axes[0].set_ylabel("efficiency (% of a worker alone)")
    plot.axes[-1].legend(frameon=False, fontsize=8)
    return plot


def plot_predictions(
    predicted: Mapping[str, tuple[float, float]],
    measured: Mapping[str, float],
    title: str = "Predicted and measured efficiency",
) -> Plot:
    """Draw a predicted range and a measured value for each case.

    Args:
        predicted: case -> lowest and highest efficiency, 0 to 1.
        measured: the same cases -> efficiency, 0 to 1.
        title: the figure's title.
    """
    plot = Plot(f"{title} of {' and '.join(predicted)}", height=1.9 + 0.45 * len(predicted))
    axes = plot.add_subplot()
    places = range(len(predicted))
    lows, highs = zip(*predicted.values(), strict=True)
    widths = [high - low for low, high in zip(lows, highs, strict=True)]
    axes.barh(
        places, widths, left=lows, height=0.5, color="0.8", edgecolor=BLACK,
        label="predicted, from no overlap to full overlap",
    )  # fmt: skip
    axes.plot([measured[name] for name in predicted], places, "D", color=BLUE, label="measured")
    label_axes(axes, title, "efficiency (% of a worker alone)", "")
    name_rows(axes, list(predicted))
    axes.set_xlim(0.4, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    plot.legend(loc="outside lower center", ncols=2, frameon=False)
    return plot


def _kind(phase: str) -> str:
    """Return how the kind of a phase begins, of those in PHASE_KINDS."""
    return next(prefix for prefix, *_ in PHASE_KINDS if phase.startswith(prefix))
