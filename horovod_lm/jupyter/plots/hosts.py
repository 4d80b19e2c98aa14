"""Figures of several hosts: what the link between them costs."""

from __future__ import annotations

from itertools import groupby

from matplotlib.ticker import EngFormatter

from horovod_lm.jupyter.plots.style import RUN_STYLES, Plot, Rows, label_axes, styled


def plot_allreduce_over_links(
    rows: Rows, title: str = "An allreduce over links of several rates"
) -> Plot:
    """Draw measured allreduces over the size of the message, and the ring's formula as lines.

    Args:
        rows: in order of their rates; each has `megabits_per_second`, `bytes`, `seconds` and
            `formula_seconds`, as tests/benchmarks/allreduce_over_links.csv has them.
        title: the figure's title.
    """
    links = {
        f"{rate:g}": list(group)
        for rate, group in groupby(rows, lambda row: row["megabits_per_second"])
    }
    styled_links = styled(links, RUN_STYLES, "rates")
    plot = Plot(
        f"{title}: seconds over bytes at {', '.join(links)} Mbit/s, measured and by the formula"
    )
    axes = plot.add_subplot()
    for (rate, points), (colour, line, _, marker) in styled_links:
        sizes = [row["bytes"] for row in points]
        axes.plot(sizes, [row["formula_seconds"] for row in points], line, color=colour)
        axes.plot(
            sizes, [row["seconds"] for row in points], marker, color=colour, linestyle="none",
            label=f"{rate} Mbit/s",
        )  # fmt: skip
    label_axes(axes, title, "size of the message (bytes)", "time (seconds)")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, title="measured; lines: formula")
    return plot
