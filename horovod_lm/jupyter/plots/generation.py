"""Figures of generation: what may come next, and what a token costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from horovod_lm.jupyter.plots.style import BAR_STYLES, RUN_STYLES, Plot, label_axes, styled


def plot_next_words(
    words: Sequence[str],
    distributions: Mapping[str, Sequence[float] | Tensor],
    title: str = "What may come next",
) -> Plot:
    """Draw how likely each word is to come next, one panel for each way of choosing.

    Args:
        words: the candidates, in the order in which they shall stand.
        distributions: 1 to 5 ways of choosing: name -> one probability for each word, 0 to 1.
        title: the figure's title.
    """
    styled_ways = styled(distributions, BAR_STYLES, "ways")
    plot = Plot(
        f"{title}: probability of {len(words)} words, {' and '.join(distributions)}",
        height=1.3 + 0.22 * len(words),
    )
    panels = plot.subplots(1, len(distributions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, ((name, values), (colour, hatch)) in zip(panels, styled_ways, strict=True):
        heights = [float(value) for value in values]
        positions = range(len(words))
        axes.barh(positions, heights, color=colour, hatch=hatch, edgecolor="white")
        axes.set_yticks(positions, words)
        label_axes(axes, name, "probability", "")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()  # the first word stands on top
    panels[0].set_ylabel("next word")
    plot.suptitle(title)
    return plot


def plot_cost_by_length(
    lengths: Sequence[int],
    milliseconds: Mapping[str, Sequence[float]],
    title: str = "What the next token costs",
) -> Plot:
    """Draw the time of one more token over the length of the text before it.

    Args:
        lengths: tokens of the text.
        milliseconds: way of generating (1 to 4) -> milliseconds of one token at each length.
        title: the figure's title.
    """
    plot = Plot(f"{title}: milliseconds over tokens so far, {' and '.join(milliseconds)}")
    axes = plot.add_subplot()
    for (name, times), (colour, line, width, marker) in styled(milliseconds, RUN_STYLES, "ways"):
        axes.plot(lengths, times, line, color=colour, linewidth=width, marker=marker, label=name)
    label_axes(
        axes, title, "length of the text so far (tokens)", "time of one token (milliseconds)"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return plot
