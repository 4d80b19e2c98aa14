"""Where words look, as a table of shaded cells; and what looking costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from torch import Tensor

from horovod_lm.jupyter.plots.style import BLACK, RUN_STYLES, Plot, label_axes, styled

PAGE_WIDTH, SMALLEST_MAP, LARGEST_MAP = 8.0, 1.3, 2.0  # inches; more heads than fit make it wider
MOST_WITH_NUMBERS = 10  # words; a map of more has no room for a number in each cell


def plot_attention(weights: Tensor, words: Sequence[str], title: str) -> Plot:
    """Draw how much each word looks at each other one; darker is more.

    In a map of few words each cell says its number; beside one of many stands a scale.

    Args:
        weights: (T, T), a row for each word that looks; rows sum to 1.
        words: the T words.
        title: the figure's title.
    """
    numbered = len(words) <= MOST_WITH_NUMBERS
    width, height = (5.6, 4.6) if numbered else (2.6 + 0.24 * len(words), 1.8 + 0.24 * len(words))
    plot = Plot(f"{title}: {len(words)} words", width, height)
    axes = plot.subplots()
    image = axes.imshow(weights.tolist(), cmap="Greys", vmin=0, vmax=1)
    axes.set(title=title, xlabel="word looked at (key)", ylabel="word that looks (query)")
    axes.set_xticks(range(len(words)), words, rotation=0 if numbered else 90)
    axes.set_yticks(range(len(words)), words)
    if numbered:
        _write_numbers(axes, weights.tolist())
    else:
        plot.colorbar(image, ax=axes, shrink=0.7, label="weight")
    return plot


def _write_numbers(axes: Axes, rows: list[list[float]]) -> None:
    for row, line in enumerate(rows):
        for column, weight in enumerate(line):
            shade = "white" if weight > 0.5 else "black"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=shade)


def plot_attention_cost(
    lengths: Sequence[int],
    milliseconds: Mapping[str, Sequence[float]],
    title: str = "What attention costs",
) -> Plot:
    """Draw the time of one attention over the length of its text, with a line that grows as T^2.

    Args:
        lengths: T, the words of a text, growing.
        milliseconds: way of computing it (1 to 4) -> its time at each length. The line of T^2 goes
            through the last time of the first one.
        title: the figure's title.
    """
    plot = Plot(f"{title}: milliseconds over words, {' and '.join(milliseconds)}, beside T squared")
    axes = plot.add_subplot()
    for (name, times), (colour, line, width, marker) in styled(milliseconds, RUN_STYLES, "ways"):
        axes.plot(lengths, times, line, color=colour, linewidth=width, marker=marker, label=name)
    last = next(iter(milliseconds.values()))[-1]
    squares = [last * (length / lengths[-1]) ** 2 for length in lengths]
    axes.plot(lengths, squares, ":", color=BLACK, linewidth=1.2, label="grows as T squared")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    label_axes(axes, title, "length of the text, T (words)", "time of one attention (milliseconds)")
    axes.legend(frameon=False)
    return plot


def plot_all_heads(weights: Tensor, entropy_bits: Tensor, title: str) -> Plot:
    """Draw the map of every head, small, a row for each layer, with its entropy above it.

    Args:
        weights: (L, H, T, T).
        entropy_bits: (L, H), the mean entropy of a head's rows in bits.
        title: the figure's title.
    """
    n_layers, n_heads = weights.shape[:2]
    side = min(max(PAGE_WIDTH / n_heads, SMALLEST_MAP), LARGEST_MAP)  # inches
    layers = f"{n_layers} layer{'s' if n_layers > 1 else ''}"
    plot = Plot(
        f"{title}: {layers} of {n_heads} heads", side * n_heads, 0.5 + (side + 0.1) * n_layers
    )
    for layer, panels in enumerate(plot.subplots(n_layers, n_heads, squeeze=False)):
        for head, axes in enumerate(panels):
            axes.imshow(weights[layer, head].tolist(), cmap="Greys", vmin=0, vmax=1)
            axes.set_title(
                f"{layer + 1}.{head + 1}: {entropy_bits[layer, head]:.2f} bit", fontsize=8
            )
            axes.set(xticks=[], yticks=[])
    plot.suptitle(f"{title} (layer.head: entropy; darker is more)", fontsize=9)
    return plot
