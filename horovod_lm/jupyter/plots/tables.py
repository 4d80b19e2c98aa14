"""Figures of shaded cells: attention weights, shards of the data, the steps of a ring allreduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

from horovod_lm.analysis.ring import RingState
from horovod_lm.jupyter.plots.charts import Plot

PAGE_WIDTH, SMALLEST_MAP, LARGEST_MAP = 8.0, 1.3, 2.0  # inches
MAX_WORDS_WITH_NUMBERS = 10  # a map of more words has no space for a number in each cell
PANELS_IN_A_ROW = 4
RANK_SHADES = ("#FFFFFF", "#F0E442", "#56B4E9", "#0072B2")  # Okabe and Ito, from light to dark


def plot_attention(
    weights: Tensor | Mapping[str, Tensor],
    words: Sequence[str],
    title: str,
    x_label: str = "word looked at (key)",
    y_label: str = "word that looks (query)",
    label: str = "weight",
) -> Plot:
    """Draw attention weights, or another table of words by words; darker is more.

    Each cell of a small table holds its number; larger tables have a colour bar.

    Args:
        weights: (T, T), a row for each query, entries from 0 to 1; or name -> (T, T), one panel
            for each.
        words: the T words.
        title: the figure's title.
        x_label: what a column is.
        y_label: what a row is.
        label: what an entry is.
    """
    maps = {"": weights} if isinstance(weights, Tensor) else weights
    names = "".join(f", {name}" for name in maps if name)
    numbered = len(words) <= MAX_WORDS_WITH_NUMBERS
    side = 3.6 if numbered else 0.24 * len(words)  # inches
    plot = Plot(f"{title}: {len(words)} words{names}", 2 + (side + 0.4) * len(maps), side + 1.4)
    plot.set_layout_engine("compressed")  # for panels of equal aspect
    panels = plot.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (name, one) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(one.tolist(), cmap="Greys", vmin=0, vmax=1)
        axes.set(title=name or title, xlabel=x_label)
        axes.set_xticks(range(len(words)), words, rotation=0 if numbered else 90)
        axes.set_yticks(range(len(words)), words)
        if numbered:
            for row, line in enumerate(one.tolist()):
                for column, weight in enumerate(line):
                    _write(axes, column, row, f"{weight:.2f}", on_dark=weight > 0.5)
    panels[0].set_ylabel(y_label)
    if not numbered:
        plot.colorbar(image, ax=panels, shrink=0.7, label=label)
    if names:
        plot.suptitle(title)
    return plot


def plot_all_heads(weights: Tensor, entropy_bits: Tensor, title: str) -> Plot:
    """Draw a small map of every head, a row for each layer, with its entropy above it.

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
            axes.set(xticks=[], yticks=[])
            bits = entropy_bits[layer, head].item()
            axes.set_title(f"{layer + 1}.{head + 1}: {bits:.2f} bit", fontsize=8)
    plot.suptitle(f"{title} (layer.head: entropy; darker is more)", fontsize=9)
    return plot


def plot_shards(panels: Mapping[str, Sequence[Sequence[int]]], title: str) -> Plot:
    """Draw which rank reads which sample in which epoch.

    Args:
        panels: name -> a row for each epoch: the rank, 0 to 3, that reads each sample.
        title: the figure's title.

    Raises:
        ValueError: a rank is above 3.
    """
    tables = list(panels.values())
    highest = max(rank for table in tables for row in table for rank in row)
    if highest >= len(RANK_SHADES):
        raise ValueError(f"a figure shows ranks 0 to {len(RANK_SHADES) - 1}, not {highest}")
    n_epochs, n_samples = len(tables[0]), len(tables[0][0])
    plot = Plot(
        f"{title}: {highest + 1} ranks, {n_samples} samples, {n_epochs} epochs,"
        f" {' and '.join(panels)}",
        height=0.8 + len(panels) * (0.9 + 0.26 * n_epochs),
    )
    shades = ListedColormap(RANK_SHADES)
    subplots = plot.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (name, rows) in zip(subplots, panels.items(), strict=True):
        axes.imshow(rows, cmap=shades, vmin=-0.5, vmax=len(RANK_SHADES) - 0.5, aspect="auto")
        for epoch, row in enumerate(rows):
            for sample, rank in enumerate(row):
                _write(axes, sample, epoch, str(rank), on_dark=rank == len(RANK_SHADES) - 1)
                corner = (sample - 0.5, epoch - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="0.4", linewidth=0.5))
        axes.set_xticks(range(n_samples))
        axes.set_yticks(range(len(rows)))
        axes.tick_params(length=0)
        axes.set(title=name, xlabel="sample (number)", ylabel="epoch")
    plot.suptitle(title)
    return plot


def name_of_sum(contributors: frozenset[int], chunk: int, workers: int) -> str:
    """Return the short name of a partial sum: "2", "2+3", "4 of 8", or "all".

    Args:
        contributors: the workers whose numbers are summed.
        chunk: the chunk's number, which is also the worker where its way round the ring begins.
        workers: the number of workers.
    """
    if len(contributors) == workers > 1:
        return "all"
    if len(contributors) > 3:
        return f"{len(contributors)} of {workers}"
    return "+".join(map(str, sorted(contributors, key=lambda worker: (worker - chunk) % workers)))


def plot_ring_steps(states: Sequence[RingState], title: str = "") -> Plot:
    """Draw which workers' numbers are summed in each worker's chunks, one panel for each step.

    The darker a cell, the more numbers are in its sum; a thick frame marks a chunk that has just
    arrived.

    Args:
        states: the result of `ring_allreduce`.
        title: the figure's title.
    """
    workers = states[0].workers
    title = title or f"A ring of {workers} workers sums its chunks"
    columns = min(PANELS_IN_A_ROW, len(states))
    rows = -(-len(states) // columns)
    plot = Plot(
        f"{title}: whose numbers each of {workers} workers holds after each of"
        f" {len(states) - 1} steps",
        width=0.6 + columns * (0.8 + 0.4 * workers),
        height=0.7 + rows * (0.8 + 0.28 * workers),
    )
    panels = plot.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(states) :]:
        axes.set_visible(False)
    for number, (axes, state) in enumerate(zip(panels.flat, states, strict=False)):
        _draw_ring_state(axes, state)
        axes.tick_params(length=0, labelbottom=number + columns >= len(states))
    plot.suptitle(title)
    plot.supxlabel("chunk of the data", fontsize="medium")
    plot.supylabel("worker", fontsize="medium")
    return plot


def _draw_ring_state(axes: Axes, state: RingState) -> None:
    workers = state.workers
    counts = [[len(contributors) / workers for contributors in row] for row in state.holds]
    axes.imshow(counts, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
    for worker, row in enumerate(state.holds):
        for chunk, contributors in enumerate(row):
            _write(axes, chunk, worker, name_of_sum(contributors, chunk, workers), fontsize=8)
    for message in state.messages:
        corner = (message.chunk - 0.46, message.receiver - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, linewidth=1.8))
    axes.set_title(
        f"step {state.step}: {state.phase}" if state.step else "start", fontsize="medium"
    )
    axes.set(xticks=range(workers), yticks=range(workers))


def _write(
    axes: Axes, column: int, row: int, text: str, on_dark: bool = False, fontsize: float = 10
) -> None:
    colour = "white" if on_dark else "black"
    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=fontsize)
