"""Figures of data: what a vocabulary saves, what knowledge is worth, and who sees which sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from horovod_lm.jupyter.plots.style import BLACK, BLUE, RUN_STYLES, Plot, label_axes, styled

RANK_SHADES = ("#FFFFFF", "#F0E442", "#56B4E9", "#0072B2")  # Okabe and Ito, from light to dark


def plot_tokens_per_character(
    merges: Sequence[int],
    tokens_per_character: Mapping[str, Sequence[float]],
    title: str = "What each merge saves",
) -> Plot:
    """Draw how the number of tokens falls while a byte-pair encoding learns merges.

    Args:
        merges: numbers of merges, rising.
        tokens_per_character: 1 to 4 texts: name -> tokens per character after so many merges.
        title: the figure's title.
    """
    styled_texts = styled(tokens_per_character, RUN_STYLES, "texts")
    names = " and ".join(tokens_per_character)
    plot = Plot(f"{title}: tokens per character after 0 to {merges[-1]} merges, {names}")
    axes = plot.add_subplot()
    for (name, values), (colour, line, _, marker) in styled_texts:
        axes.plot(merges, values, line, color=colour, linewidth=1.8, marker=marker, label=name)
    label_axes(axes, title, "merges learned", "tokens per character")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return plot


def plot_losses_above_floor(
    losses: Mapping[str, float], floor: float, title: str = "Nobody is below the entropy"
) -> Plot:
    """Draw the loss of several models as bars, and the entropy as a line that none can cross.

    Args:
        losses: model -> mean loss in nats per text, drawn from top to bottom.
        floor: entropy in nats per text.
        title: the figure's title.
    """
    plot = Plot(
        f"{title}: nats per text of {len(losses)} models above {floor:.1f}",
        height=1.4 + 0.4 * len(losses),
    )
    axes = plot.add_subplot()
    bars = axes.barh(list(losses), list(losses.values()), color=BLUE, height=0.6)
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.axvline(floor, color=BLACK, linestyle="--", linewidth=1.6, label=f"entropy: {floor:.1f}")
    label_axes(axes, title, "mean loss (nats per text)", "model")
    axes.margins(x=0.1)
    axes.invert_yaxis()  # the first model stands on top
    axes.legend(frameon=False, loc="lower right")
    return plot


def plot_shards(panels: Mapping[str, Sequence[Sequence[int]]], title: str) -> Plot:
    """Draw which rank sees which sample in which epoch, as a table of numbers on shaded cells.

    Args:
        panels: name -> a row for each epoch, in it the rank that sees each sample, from 0 to 3.
        title: the figure's title.
    """
    tables = list(panels.values())
    highest = max(rank for table in tables for row in table for rank in row)
    if highest >= len(RANK_SHADES):
        raise ValueError(f"a figure shows ranks 0 to {len(RANK_SHADES) - 1}, not {highest}")
    epochs, samples = len(tables[0]), len(tables[0][0])
    plot = Plot(
        f"{title}: {highest + 1} ranks, {samples} samples, {epochs} epochs, {' and '.join(panels)}",
        height=0.8 + len(panels) * (0.9 + 0.26 * epochs),
    )
    for axes, (name, rows) in zip(
        plot.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        _draw_table(axes, rows)
        axes.set(title=name, xlabel="sample (number)", ylabel="epoch")
    plot.suptitle(title)
    return plot


def _draw_table(axes: Axes, rows: Sequence[Sequence[int]]) -> None:
    axes.pcolormesh(
        [list(row) for row in rows],
        cmap=ListedColormap(RANK_SHADES),
        vmin=-0.5,
        vmax=len(RANK_SHADES) - 0.5,
        edgecolor="0.4",
        linewidth=0.5,
    )
    for epoch, row in enumerate(rows):
        for sample, rank in enumerate(row):
            shade = "white" if rank == len(RANK_SHADES) - 1 else "black"
            axes.text(sample + 0.5, epoch + 0.5, str(rank), ha="center", va="center", color=shade)
    axes.set_xticks([sample + 0.5 for sample in range(len(rows[0]))], range(len(rows[0])))
    axes.set_yticks([epoch + 0.5 for epoch in range(len(rows))], range(len(rows)))
    axes.invert_yaxis()  # the first epoch stands on top
    axes.tick_params(length=0)
