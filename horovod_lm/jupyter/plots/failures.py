"""Figures of failures: what is lost with a part of a checkpoint, and a run whose ranks change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from horovod_lm.jupyter.plots.style import BLACK, BLUE, ORANGE, STEPS, Plot, Rows, label_axes
from horovod_lm.jupyter.plots.training import draw_loss

PANELS_IN_A_ROW = 3
STEPS_SHOWN_BEFORE = 6  # before a run was resumed


def plot_partings(
    whole: Sequence[float],
    resumed: Mapping[str, Sequence[float]],
    title: str = "Resumed, with a part left out",
) -> Plot:
    """Draw how runs go on that were resumed, each beside the run that was never interrupted.

    Args:
        whole: the loss of each step of the uninterrupted run, from step 1 on, in nats per token.
        resumed: name -> the losses of a resumed run, which ends at the same step.
        title: the figure's title.

    Returns:
        The figure, one panel for each resumed run, from a few steps before it was resumed; what
        lies between the two curves is shaded.

    Raises:
        ValueError: there is no resumed run, or one has more steps than the whole.
    """
    if not resumed or any(len(losses) > len(whole) for losses in resumed.values()):
        raise ValueError("at least one run is needed, each of them the end of the whole run")
    n_rows = -(-len(resumed) // PANELS_IN_A_ROW)
    plot = Plot(
        f"{title}: loss over the steps, uninterrupted and {', '.join(resumed)}",
        width=9.0,
        height=0.6 + 2.3 * n_rows,
    )
    plot.suptitle(title)
    grid = plot.subplots(
        n_rows, min(PANELS_IN_A_ROW, len(resumed)), sharex=True, sharey=True, squeeze=False
    )
    panels = list(grid.flat)
    for axes, (name, losses) in zip(panels, resumed.items(), strict=False):
        _draw_parting(axes, whole, losses)
        label_axes(axes, name, STEPS, "loss (nats per token)")
        axes.label_outer()
    for axes in panels[len(resumed) :]:
        axes.set_axis_off()
    panels[0].legend(frameon=False, fontsize=8)
    return plot


def _draw_parting(axes: Axes, whole: Sequence[float], losses: Sequence[float]) -> None:
    start = len(whole) - len(losses)
    first = max(0, start - STEPS_SHOWN_BEFORE)
    steps = range(1, len(whole) + 1)
    axes.fill_between(
        steps[start:], whole[start:], losses, color="0.8", linewidth=0, label="between them"
    )
    axes.plot(
        steps[first:], whole[first:], "-", color=BLUE, linewidth=3.0, label="never interrupted"
    )
    axes.plot(steps[start:], losses, "--", color=ORANGE, linewidth=1.8, label="resumed")
    axes.axvline(start + 0.5, color=BLACK, linestyle=":", linewidth=1)


def plot_world(rows: Rows, title: str = "A run whose ranks change") -> Plot:
    """Draw the loss of a run, and under it how many ranks took each step.

    Args:
        rows: the rows of one run; those of the phase `train` have a `world_size`.
        title: the figure's title.
    """
    plot = Plot(f"{title}: training loss and number of ranks over the steps", height=4.6)
    above, below = plot.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_loss(above, {"": rows}, title)
    above.legend(facecolor="white", edgecolor="none", framealpha=1)  # no mark crosses it
    above.set_xlabel("")
    taken = [row for row in rows if row["phase"] == "train"]
    steps, ranks = [row["step"] for row in taken], [row["world_size"] for row in taken]
    below.fill_between(steps, ranks, step="mid", color=ORANGE, linewidth=0)
    below.step(steps, ranks, where="mid", color=BLACK, linewidth=1.2)
    for before, after, step in zip(ranks, ranks[1:], steps[1:], strict=False):
        if before != after:
            for axes in (above, below):
                axes.axvline(step - 0.5, color=BLACK, linestyle=":", linewidth=1)
    label_axes(below, "", STEPS, "ranks")
    below.set_ylim(0, max(ranks) + 0.4)
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    return plot
