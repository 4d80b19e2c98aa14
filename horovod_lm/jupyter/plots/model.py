"""Figures of the model: what it is made of, how numbers grow in it, what can matter to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from horovod_lm.jupyter.plots.style import (
    BAR_STYLES,
    RUN_STYLES,
    Plot,
    label_axes,
    name_rows,
    styled,
)


def plot_pieces(bars: Mapping[str, Mapping[str, float]], title: str, unit: str) -> Plot:
    """Draw what sums are made of: a bar for each sum, cut into its pieces.

    Args:
        bars: name of a sum -> its pieces: name -> size; at most 5 different pieces in all.
        title: the figure's title.
        unit: what the lengths are, with the unit.
    """
    names = dict.fromkeys(name for pieces in bars.values() for name in pieces)
    sizes = {name: [pieces.get(name, 0.0) for pieces in bars.values()] for name in names}
    styled_sizes = styled(sizes, BAR_STYLES, "pieces")
    plot = Plot(
        f"{title}: {unit} of {' and '.join(bars)}, in {', '.join(names)}",
        height=1.9 + 0.45 * len(bars),
    )
    axes = plot.add_subplot()
    ends = [0.0] * len(bars)
    for (name, lengths), (colour, hatch) in styled_sizes:
        axes.barh(
            range(len(bars)), lengths, 0.6, ends, label=name, color=colour, hatch=hatch,
            edgecolor="white",
        )  # fmt: skip
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    label_axes(axes, title, unit, "")
    name_rows(axes, list(bars))
    axes.tick_params(axis="y", length=0)
    plot.legend(loc="outside lower center", ncols=3, frameon=False)
    return plot


def plot_depth(streams: Mapping[str, Sequence[float]], title: str) -> Plot:
    """Draw how large the numbers of the residual stream are, from the embedding to the last block.

    Args:
        streams: 1 to 4 models: name -> the standard deviation before any block, after the first...
        title: the figure's title.
    """
    styled_streams = styled(streams, RUN_STYLES, "models")
    plot = Plot(f"{title}: standard deviation over blocks passed, {' and '.join(streams)}")
    axes = plot.add_subplot()
    for (name, sizes), (colour, line, _, marker) in styled_streams:
        axes.plot(
            range(len(sizes)), sizes, line, color=colour, linewidth=1.6, marker=marker,
            markersize=4, label=name,
        )  # fmt: skip
    label_axes(axes, title, "blocks passed", "standard deviation of the stream")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return plot


def plot_influence(influences: Mapping[str, Tensor], words: Sequence[str], title: str) -> Plot:
    """Draw how much each word's vector matters to what is predicted at each word; darker is more.

    Args:
        influences: name of a model -> (T, T), row: where it predicts, column: the word that is
            changed, entry: the size of the gradient, at least 0. Each row is drawn as shares of
            its largest entry.
        words: the T words.
        title: the figure's title.
    """
    plot = Plot(
        f"{title}: gradient among {len(words)} words, {' and '.join(influences)}",
        width=1.2 + 3.9 * len(influences),
        height=4.9,
    )
    panels = plot.subplots(1, len(influences), sharey=True, squeeze=False)[0]
    for axes, (name, influence) in zip(panels, influences.items(), strict=True):
        shares = influence / influence.amax(dim=-1, keepdim=True)
        image = axes.imshow(shares.tolist(), cmap="Greys", vmin=0, vmax=1)
        axes.set(title=name, xlabel="word that is changed")
        axes.set_xticks(range(len(words)), words, rotation=90)
        axes.set_yticks(range(len(words)), words)
    panels[0].set_ylabel("predicted from here")
    plot.colorbar(image, ax=panels, shrink=0.7, label="gradient (share of the row's largest)")
    plot.suptitle(title)
    return plot
