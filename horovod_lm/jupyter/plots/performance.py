"""Figures of performance: Horovod's timeline, allreduce times, and the cost model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator, PercentFormatter

from horovod_lm.analysis.scaling import Job, Measurement, Network, breaking_point, curve
from horovod_lm.analysis.timeline import NEGOTIATION, REDUCTION, Span
from horovod_lm.jupyter.plots.charts import (
    BLACK,
    BLUE,
    LINE_STYLES,
    ORANGE,
    PINK,
    Plot,
    label_axes,
    with_styles,
)

MILLISECONDS = 1000  # in a second
MAX_WORKERS = 4096
# The beginning of a phase's name -> label, colour, hatching. The first match counts; what matches
# no other is the transfer itself: GLOO_ALLREDUCE, NCCL_ALLREDUCE ...
PHASES = {
    NEGOTIATION: ("waits until all ranks have it", "0.85", ""),
    REDUCTION: ("waits for its turn", PINK, ".."),
    "MEMCPY_": ("copied into or out of the fusion buffer", ORANGE, "//"),
    "INIT_FUSION_BUFFER": ("copied into or out of the fusion buffer", ORANGE, "//"),
    "": ("travels", BLUE, ""),
}


def plot_timeline(spans: Sequence[Span], title: str = "One step in Horovod's timeline") -> Plot:
    """Draw the phases of each tensor's reduction: a row for each tensor, in order of reduction.

    Args:
        spans: of one step, as `horovod_lm.analysis.timeline.reduction` returns them.
        title: the figure's title.
    """
    starts = {span.tensor: span.start for span in reversed(spans) if span.phase == REDUCTION}
    rows = {tensor: row for row, tensor in enumerate(sorted(starts, key=starts.__getitem__))}
    plot = Plot(f"{title}: what happens to {len(rows)} tensors when", height=4.2)
    axes = plot.add_subplot()
    spans = [span for span in spans if span.tensor in rows]
    first = min((span.start for span in spans), default=0.0)
    for prefix, (label, colour, hatch) in PHASES.items():
        chosen = [span for span in spans if _prefix(span.phase) == prefix]
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
    labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # no duplicates
    plot.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2, frameon=False)
    return plot


def _prefix(phase: str) -> str:
    return next(prefix for prefix in PHASES if phase.startswith(prefix))


def plot_allreduces(
    measured: Mapping[str, Sequence[Measurement]],
    networks: Mapping[str, Network],
    title: str = "Time of an allreduce by its size",
) -> Plot:
    """Draw measured allreduces as points and the cost model as lines, both axes logarithmic.

    Args:
        measured: name (1 to 4) -> allreduces of one number of workers, at several sizes.
        networks: the same names -> the link that the cost model assumes.
        title: the figure's title.
    """
    plot = Plot(f"{title}: seconds over bytes, {' and '.join(measured)}", height=4)
    axes = plot.add_subplot()
    for (name, rows), style in with_styles(measured, LINE_STYLES, "links"):
        ends = min(row.size for row in rows), max(row.size for row in rows)
        _draw_allreduces(axes, networks[name], rows[0].workers, ends, rows, name, style)
    _label_allreduces(axes, title, "size of the message (bytes)")
    return plot


def _draw_allreduces(
    axes: Axes, network: Network, workers: int, ends: tuple[float, float],
    rows: Sequence[Measurement], name: str, style: tuple[str, str, float, str],
) -> None:  # fmt: skip
    """Draw measured allreduces as points, and the cost model between two sizes as a line."""
    colour, line, _, marker = style
    sizes = np.geomspace(*ends, 60)  # straight segments would not be the model on log axes
    seconds = [network.allreduce_seconds(size, workers) for size in sizes]
    axes.plot(sizes, seconds, line, color=colour, label=None if rows else name)
    if rows:
        points = [row.size for row in rows], [row.seconds for row in rows]
        axes.plot(*points, marker, color=colour, markeredgecolor=BLACK, label=name)


def _label_allreduces(axes: Axes, title: str, x_label: str) -> None:
    axes.set_xscale("log")
    label_axes(axes, title, x_label, "time (seconds)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _format_log_seconds(axes)
    if axes.lines:
        axes.legend(
            edgecolor="none", fontsize=8, title_fontsize=8, title="points: measured; lines: model"
        )


def plot_scaling(
    job: Job,
    network: Network,
    workers: int,
    workers_per_host: int = 1,
    inside: Network | None = None,
    measurements: Sequence[Measurement] = (),
    threshold: float = 0.9,
) -> Plot:
    """Draw what the cost model predicts: step time, efficiency, and the time of an allreduce.

    Args:
        job: the arithmetic and the gradients of one worker.
        network: the link between hosts.
        workers: the chosen number of workers.
        workers_per_host: how many of them share a host's link.
        inside: the link within a host; None: not the bottleneck.
        measurements: allreduces to draw beside the prediction, of at most 3 numbers of workers.
        threshold: the efficiency, 0 to 1, below which the job does not scale.
    """
    plot = Plot(
        "What more workers would do: time of a step and efficiency over workers, time of an"
        " allreduce over its size", 11.0, 3.7,
    )  # fmt: skip
    plot.suptitle("What more workers would do")
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
    _mark(left, workers, chosen.seconds, EngFormatter("s", 1)(chosen.seconds))
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
        axes.legend(edgecolor="none", fontsize=8)

    _draw_nodes(right, job, network, -(-workers // workers_per_host), measurements)
    return plot


def _draw_nodes(
    axes: Axes, job: Job, network: Network, nodes: int, measurements: Sequence[Measurement]
) -> None:
    """Draw the predicted time of one allreduce over its size, and the measured ones."""
    size = job.bytes_reduced
    sizes = [size, *(one.size for one in measurements)]
    ends = min(sizes) / 10, max(sizes) * 10
    rows_by_nodes: dict[int, list[Measurement]] = {nodes: []} if nodes > 1 else {}
    for one in measurements:
        rows_by_nodes.setdefault(one.workers, []).append(one)
    for (count, rows), style in zip(rows_by_nodes.items(), LINE_STYLES, strict=False):
        _draw_allreduces(axes, network, count, ends, rows, f"{count:,} nodes", style)
    if nodes > 1:
        seconds = network.allreduce_seconds(size, nodes)
        _mark(axes, size, seconds, EngFormatter("s", 1)(seconds))
    _label_allreduces(axes, "One allreduce between nodes", "size of the gradients (bytes)")
    if not rows_by_nodes:
        axes.set(xscale="linear", yscale="linear", xticks=[], yticks=[])
        axes.text(
            0.5, 0.5, "all workers are on one node:\nnothing crosses the network",
            transform=axes.transAxes, ha="center",
        )  # fmt: skip


def _mark(axes: Axes, x: float, y: float, value: str) -> None:
    axes.plot([x], [y], "o", color="white", markeredgecolor=BLACK, markeredgewidth=2, markersize=9,
              label=f"chosen: {value}", zorder=5)  # fmt: skip


class _SecondsFormatter(LogFormatter):
    """Formats the ticks of a logarithmic axis as 50 ms instead of 5 x 10^-2."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return EngFormatter("s")(value) if super().__call__(value, position) else ""


def _format_log_seconds(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_SecondsFormatter())
    # Less than two decades may have one major tick: the minor ticks are labelled too.
    axes.yaxis.set_minor_formatter(_SecondsFormatter(minor_thresholds=(2, 0.5)))
