"""Where words look: attention weights as a table of shaded cells."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from horovod_lm.jupyter.plots.style import Plot


def plot_attention(weights: Tensor, words: Sequence[str], title: str) -> Plot:
    """Draw how much each word looks at each other one; darker is more, and the number says it.

    Args:
        weights: (T, T), a row for each word that looks; rows sum to 1.
        words: the T words.
        title: the figure's title.
    """
    plot = Plot(f"{title}: {len(words)} words", width=5.6, height=4.6)
    axes = plot.subplots()
    axes.imshow(weights.tolist(), cmap="Greys", vmin=0, vmax=1)
    for row, line in enumerate(weights.tolist()):
        for column, weight in enumerate(line):
            shade = "white" if weight > 0.5 else "black"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=shade)
    axes.set(title=title, xlabel="word looked at (key)", ylabel="word that looks (query)")
    axes.set_xticks(range(len(words)), words)
    axes.set_yticks(range(len(words)), words)
    return plot
