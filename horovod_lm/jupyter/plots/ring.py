"""Figures of allreduce: who holds which sum after each step, and what the ring saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from horovod_lm.jupyter.plots.style import RUN_STYLES, Plot, label_axes, styled
from horovod_lm.ring import RingState

PANELS_IN_A_ROW = 4


def name_of_sum(whose: frozenset[int], chunk: int, workers: int) -> str:
    """Return how a cell names the sum in it: "2", "2+3", "4 of 8", or "all".

    Args:
        whose: the workers whose numbers are summed.
        chunk: which chunk it is; its way round the ring begins at the worker of that number.
        workers: how many there are.
    """
    if len(whose) == workers > 1:
        return "all"
    if len(whose) > 3:
        return f"{len(whose)} of {workers}"
    return "+".join(map(str, sorted(whose, key=lambda worker: (worker - chunk) % workers)))


def plot_ring_steps(states: Sequence[RingState], title: str = "") -> Plot:
    """Draw whose numbers each worker has summed in each chunk, one panel for each step.

    The darker a cell, the more numbers are in its sum; a thick frame says that the chunk has just
    arrived.

    Args:
        states: of `ring_allreduce`.
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
        _draw_state(axes, state)
        axes.tick_params(length=0, labelbottom=number + columns >= len(states))
    plot.suptitle(title)
    plot.supxlabel("chunk of the data", fontsize="medium")
    plot.supylabel("worker", fontsize="medium")
    return plot


def plot_sent_by_workers(
    workers: Sequence[int],
    sent: Mapping[str, Sequence[float]],
    title: str = "What the busiest worker sends",
) -> Plot:
    """Draw how much the busiest worker sends in one allreduce, over the number of workers.

    Args:
        workers: how many, for each point.
        sent: name of a way (1 to 4) -> what its busiest worker sends, in multiples of its data.
        title: the figure's title.
    """
    plot = Plot(f"{title}: multiples of its data over workers, {' and '.join(sent)}")
    axes = plot.add_subplot()
    for (name, values), (colour, line, width, marker) in styled(sent, RUN_STYLES, "ways"):
        axes.plot(workers, values, line, color=colour, linewidth=width, marker=marker, label=name)
    label_axes(axes, title, "workers", "sent in one allreduce\n(multiples of one worker's data)")
    axes.set_xticks(workers)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return plot


def _draw_state(axes: Axes, state: RingState) -> None:
    workers = state.workers
    counts = [[len(whose) / workers for whose in row] for row in state.holds]
    axes.imshow(counts, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
    for worker, row in enumerate(state.holds):
        for chunk, whose in enumerate(row):
            name = name_of_sum(whose, chunk, workers)
            axes.text(chunk, worker, name, ha="center", va="center", fontsize=8)
    for message in state.messages:
        corner = (message.chunk - 0.46, message.receiver - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, linewidth=1.8))
    name = f"step {state.step}: {state.phase}" if state.step else "start"
    axes.set_title(name, fontsize="medium")
    axes.set_xticks(range(workers))
    axes.set_yticks(range(workers))
