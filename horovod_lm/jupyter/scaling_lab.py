"""A cluster, sized with sliders: what a step would take, how efficient it is, where it breaks.

ScalingLab()                                       # GPT-2 small on a network of 10 Gbit/s

rows = read_measurements("../tests/benchmarks/allreduce_over_links.csv", megabits_per_second=100)
lab = ScalingLab(measurements=rows)                # starts at the network that fits them
lab.plot()                                         # the same as a picture that needs no kernel
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from matplotlib.ticker import EngFormatter

from horovod_lm.jupyter.plots import Plot
from horovod_lm.jupyter.plots.scaling import Scene, plot_scaling
from horovod_lm.jupyter.scaling_view import (
    GOOD_ENOUGH,
    INSIDE,
    MICROSECOND,
    Choices,
    Prediction,
    predict,
    read_measurements,
    sentences,
)
from horovod_lm.jupyter.widget_parts import Message
from horovod_lm.scaling import GBIT, Measurement, Network, fit_network

__all__ = ["Choices", "ScalingLab", "prediction_table", "read_measurements"]

SECONDS_OF_QUIET = 0.05  # a picture is drawn once the sliders have rested for so long
# Choice -> what its slider is called, and its range: powers of ten from, to, and the readout; or
# the values to choose from.
SLIDERS: dict[str, tuple[str, tuple[float, float, str] | list[int]]] = {
    "parameters": ("parameters", (5, 12, ".3s")),
    "batch": ("batch (sequences per worker)", [2**power for power in range(11)]),
    "workers": ("workers", [2**power for power in range(13)]),
    "workers_per_host": ("GPUs per node", [1, 2, 4, 8, 16]),
    "gigabits_per_second": ("bandwidth of a node (Gbit/s)", (-2, 4, ".3g")),
    "microseconds": ("latency of a message (µs)", (-1, 5, ".3g")),
    "teraflops": ("arithmetic of a worker (TFLOP/s)", (-2, 3, ".3g")),
}
STYLE = {"description_width": "18em"}  # room for the longest description


def prediction_table(found: Prediction) -> str:
    """Return the prediction as a table in HTML, a row."""
    cells = {
        "step": _seconds(found.step.seconds),
        "arithmetic": _seconds(found.arithmetic),
        "allreduce": _seconds(found.step.communication),
        "of it not hidden": _seconds(found.step.exposed),
        "efficiency": f"{found.step.efficiency:.1%}",
        "all workers": f"{found.tokens_per_second:,.0f} tokens/s",
    }
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in cells)
    body = "".join(f"<td>{html.escape(value)}</td>" for value in cells.values())
    return (
        "<table aria-label='predicted step of all workers' style='border-spacing: 1em 0'>"
        f"<thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
    )


class ScalingLab(widgets.VBox):
    """Sliders for a job and a cluster, and what the cost model predicts of them.

    Args:
        choices: where the sliders start. None: GPT-2 small on 64 GPUs; with measurements, on the
            network that fits them.
        measurements: allreduces to draw beside the prediction, from `read_measurements` or your
            own; one host for each worker.
        inside: the link between the workers of one node; None: not the bottleneck.

    Raises:
        ValueError: the measurements leave the network open (see `fit_network`).
    """

    _drawing: asyncio.Task | None = None  # the picture that is about to be drawn

    def __init__(
        self,
        choices: Choices | None = None,
        measurements: Sequence[Measurement] = (),
        inside: Network | None = INSIDE,
    ) -> None:
        self.measurements, self.inside = tuple(measurements), inside
        self._start = choices or _start(self.measurements)
        self.sliders = {name: _slider(name, getattr(self._start, name)) for name in SLIDERS}
        self.sliders["overlap"] = widgets.FloatSlider(
            self._start.overlap, min=0, max=1, step=0.05, continuous_update=False, style=STYLE,
            description="overlap (share of backward)", layout=_WIDE,
        )  # fmt: skip
        self.table, self.words, self.message = widgets.HTML(), widgets.HTML(), Message()
        for slider in self.sliders.values():
            slider.observe(self.message.guarded(self._changed), "value")
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        grid = widgets.Layout(
            grid_template_columns="repeat(auto-fit, minmax(min(32em, 100%), 1fr))"
        )
        sliders = widgets.GridBox(list(self.sliders.values()), layout=grid)
        super().__init__([sliders, self.table, self.words, self.picture, self.message])
        self.look()
        self.draw()

    @property
    def choices(self) -> Choices:
        """What the sliders say now."""
        return replace(self._start, **{name: one.value for name, one in self.sliders.items()})

    def plot(self) -> Plot:
        """Return the figure of what the sliders say now, for readers who have no kernel."""
        now = self.choices
        scene = Scene(
            now.job, now.network, now.workers, now.workers_per_host, self.inside,
            self.measurements, GOOD_ENOUGH,
        )  # fmt: skip
        return plot_scaling(scene)

    def look(self) -> None:
        """Write what the sliders say now."""
        now = self.choices
        found = predict(now, self.inside)
        said = "".join(f"<li>{html.escape(one)}</li>" for one in sentences(now, found))
        self.table.value = prediction_table(found)
        self.words.value = f"<ul role='status'>{said}</ul>"
        self.message.value = ""

    def draw(self) -> None:
        """Draw what the sliders say now."""
        self.picture.value = self.plot().png()

    def close(self) -> None:
        """Take the widgets away; nothing goes on in the background."""
        if self._drawing is not None:
            self._drawing.cancel()
        super().close()

    def __repr__(self) -> str:
        """Say what it is, the same at every execution."""
        return f"scaling lab: {self.choices}"

    # ---- inside ---------------------------------------------------------------------------------

    def _changed(self, _: Any) -> None:
        """Write at once; draw when the sliders rest, because a picture takes far longer."""
        self.look()
        if self._drawing is not None:
            self._drawing.cancel()
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # no kernel's event loop: a plain script
            self.draw()
        else:
            self._drawing = asyncio.ensure_future(self._draw_soon())

    async def _draw_soon(self) -> None:
        await asyncio.sleep(SECONDS_OF_QUIET)
        with self.message.errors_shown():
            self.draw()


_WIDE = widgets.Layout(width="auto")


def _slider(name: str, value: float) -> widgets.ValueWidget:
    """Make the slider of one choice, standing at a value, or at the nearest one that it has."""
    description, span = SLIDERS[name]
    common = {
        "description": description, "continuous_update": False, "style": STYLE, "layout": _WIDE
    }  # fmt: skip
    if isinstance(span, list):
        nearest = min(span, key=lambda one: abs(one - value))
        return widgets.SelectionSlider(options=span, value=nearest, **common)
    low, high, readout = span
    kept = min(max(value, 10.0**low), 10.0**high)
    return widgets.FloatLogSlider(
        kept, min=low, max=high, step=0.05, readout_format=readout, **common
    )


def _start(measurements: Sequence[Measurement]) -> Choices:
    if not measurements:
        return Choices()
    network = fit_network(measurements)
    return Choices(
        gigabits_per_second=network.bandwidth / GBIT, microseconds=network.latency / MICROSECOND
    )


def _seconds(value: float) -> str:
    return EngFormatter(unit="s", places=1)(value)
