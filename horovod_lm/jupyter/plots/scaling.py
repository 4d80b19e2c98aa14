"""What more workers would do: predicted steps, efficiency, and allreduces beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter, StrMethodFormatter

from horovod_lm.jupyter.plots.style import BLACK, BLUE, GREEN, ORANGE, PINK, Plot, label_axes
from horovod_lm.scaling import Job, Measurement, Network, breaking_point, curve

MOST_WORKERS = 4096
# Of measured allreduces: colour, line and marker for each number of workers.
MEASURED_STYLES = ((ORANGE, "--", "s"), (GREEN, "-.", "^"), (PINK, ":", "D"))


@dataclass(frozen=True)
class Scene:
    """What a figure of scaling shows.

    Attributes:
        job: the arithmetic and the gradients of one worker.
        network: the link between hosts.
        workers: how many, all together.
        workers_per_host: how many of them share a host's link.
        inside: the link within a host; None: not the bottleneck.
        measurements: allreduces to draw beside the prediction.
        good_enough: the efficiency below which the job counts as broken, 0 to 1.
    """

    job: Job
    network: Network
    workers: int
    workers_per_host: int = 1
    inside: Network | None = None
    measurements: Sequence[Measurement] = field(default=())
    good_enough: float = 0.9


def plot_scaling(scene: Scene, title: str = "What more workers would do") -> Plot:
    """Draw a step, the efficiency and one allreduce, over the number of workers and the size.

    Args:
        scene: the job, the network and the measurements.
        title: the figure's title.
    """
    plot = Plot(
        f"{title}: time of a step and efficiency over workers, time of an allreduce over its size",
        11.0, 3.7,
    )  # fmt: skip
    steps, efficiency, links = plot.subplots(1, 3)
    plot.suptitle(title)
    counts = _counts(scene)
    draw_steps(steps, scene, counts)
    draw_efficiency(efficiency, scene, counts)
    draw_allreduces(links, scene)
    return plot


def draw_steps(axes: Axes, scene: Scene, counts: Sequence[int]) -> None:
    """Draw the time of a step and its parts over the number of workers."""
    steps = curve(scene.job, scene.network, counts, scene.workers_per_host, scene.inside)
    axes.plot(counts, [one.seconds for one in steps], "-", color=BLUE, linewidth=2.4, label="step")
    axes.axhline(
        scene.job.seconds_per_step, color=BLACK, linestyle="--", linewidth=1.2, label="arithmetic"
    )
    talking = [(count, one.communication) for count, one in zip(counts, steps, strict=True)]
    talking = [pair for pair in talking if pair[1] > 0]  # a logarithmic axis has no zero
    if talking:
        axes.plot(*zip(*talking, strict=True), ":", color=ORANGE, linewidth=2, label="allreduce")
    chosen = steps[counts.index(scene.workers)]
    _mark(axes, scene.workers, chosen.seconds, f"chosen: {_seconds(chosen.seconds)}")
    _count_workers(axes)
    axes.set_yscale("log")
    label_axes(axes, "Time of a step", "workers", "time (seconds)")
    _name_seconds(axes)
    axes.legend(frameon=False, fontsize=8)


def draw_efficiency(axes: Axes, scene: Scene, counts: Sequence[int]) -> None:
    """Draw each worker's speed as a share of its speed alone, and where that is too little."""
    steps = curve(scene.job, scene.network, counts, scene.workers_per_host, scene.inside)
    shares = [one.efficiency for one in steps]
    axes.plot(counts, shares, "-", color=BLUE, linewidth=2.4)
    axes.axhline(
        scene.good_enough, color=BLACK, linestyle="--", linewidth=1.2,
        label=f"good enough: {scene.good_enough:.0%}",
    )  # fmt: skip
    breaks = breaking_point(
        scene.job, scene.network, scene.workers_per_host, scene.inside, scene.good_enough
    )
    if breaks is not None and breaks <= max(counts):
        axes.axvline(
            breaks, color=ORANGE, linestyle=":", linewidth=2, label=f"breaks at {breaks:,} workers"
        )
    chosen = shares[counts.index(scene.workers)]
    _mark(axes, scene.workers, chosen, f"chosen: {chosen:.0%}")
    _count_workers(axes)
    axes.set_ylim(0, 1.05)
    label_axes(axes, "Efficiency", "workers", "speed of a worker, of its speed alone")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=8, loc="best")


def draw_allreduces(axes: Axes, scene: Scene) -> None:
    """Draw the predicted time of one allreduce over its size, and the measured ones."""
    hosts = -(-scene.workers // scene.workers_per_host)
    size = scene.job.bytes_reduced
    sizes = [size, *(one.size for one in scene.measurements)]
    ends = min(sizes) / 10, max(sizes) * 10
    if hosts > 1:
        _draw_link(axes, scene.network, hosts, ends, ("-", BLUE))
        seconds = scene.network.allreduce_seconds(size, hosts)
        _mark(axes, size, seconds, f"chosen: {_seconds(seconds)}")
    groups = sorted({one.workers for one in scene.measurements if one.workers > 1})
    for workers, (colour, line, marker) in zip(groups, MEASURED_STYLES, strict=False):
        _draw_link(axes, scene.network, workers, ends, (line, colour))
        points = [one for one in scene.measurements if one.workers == workers]
        axes.plot(
            [one.size for one in points], [one.seconds for one in points], marker, color=colour,
            markeredgecolor=BLACK, label=f"{workers} nodes, measured",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    label_axes(
        axes, "One allreduce between nodes", "size of the gradients (bytes)", "time (seconds)"
    )
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=""))
    _name_seconds(axes)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(
            0.5, 0.5, "all workers are on one node:\nnothing crosses the network",
            transform=axes.transAxes, ha="center",
        )  # fmt: skip


def _draw_link(
    axes: Axes, network: Network, hosts: int, ends: tuple[float, float], style: tuple[str, str]
) -> None:
    """Draw the time of an allreduce from the smallest to the largest size."""
    line, colour = style
    first, last = ends
    sizes = [first * (last / first) ** (part / 40) for part in range(41)]
    seconds = [network.allreduce_seconds(size, hosts) for size in sizes]
    label = f"{hosts:,} nodes, predicted"
    axes.plot(sizes, seconds, line, color=colour, linewidth=1.6, label=label)


def _counts(scene: Scene) -> list[int]:
    """Return the numbers of workers to draw: the powers of two, and where the line bends."""
    powers = {2**power for power in range(MOST_WORKERS.bit_length())}
    full = scene.workers_per_host  # one worker more needs a second host
    return sorted({*powers, scene.workers, full, min(full + 1, MOST_WORKERS)})


def _count_workers(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 16, 64, 256, 1024, 4096])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _mark(axes: Axes, x: float, y: float, label: str) -> None:
    axes.plot([x], [y], "o", color="white", markeredgecolor=BLACK, markeredgewidth=2, markersize=9,
              label=label, zorder=5)  # fmt: skip


class _LogSeconds(LogFormatter):
    """Names the ticks that a logarithmic axis would name, as 50 ms and not as 5 x 10^-2."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return EngFormatter(unit="s")(value) if super().__call__(value, position) else ""


def _name_seconds(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(_LogSeconds())
    # Named too where less than two decades are shown, as a decade alone may have one major tick.
    axes.yaxis.set_minor_formatter(_LogSeconds(minor_thresholds=(2, 0.5)))


def _seconds(value: float) -> str:
    return EngFormatter(unit="s", places=1)(value)
