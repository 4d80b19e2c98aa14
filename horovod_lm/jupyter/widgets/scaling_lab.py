"""A widget that predicts step time and efficiency for a job and a cluster chosen with sliders.

lab = ScalingLab()    # GPT-2 small on a network of 10 Gbit/s
lab.plot()            # a figure, for pages without a kernel
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as widgets
from matplotlib.ticker import EngFormatter

from horovod_lm.analysis.scaling import GBIT, Job, Network, flops_per_token, step
from horovod_lm.jupyter.plots import Plot, plot_scaling
from horovod_lm.jupyter.widgets.widget_parts import BaseWidget, html_table, labelled

INSIDE = Network(latency=5e-6, bandwidth=25e9)  # between GPUs of one node, over PCIe 4.0 x16
THRESHOLD = 0.9  # efficiency; what Horovod's authors published for their best models
DRAWING_DELAY = 0.05  # seconds after the last change
# All descriptions have the same width; a slider waits for the end of a move.
LOOK: dict[str, Any] = {"width": "auto", "label": "18em", "continuous_update": False}
# Slider -> description and range: exponents of ten with the readout's format, or all values.
SLIDERS: dict[str, tuple[str, tuple[float, float, str] | list[int]]] = {
    "parameters": ("parameters", (5, 12, ".3s")),
    "batch": ("batch (sequences per worker)", [2**power for power in range(11)]),
    "workers": ("workers", [2**power for power in range(13)]),
    "workers_per_host": ("GPUs per node", [1, 2, 4, 8, 16]),
    "gigabits_per_second": ("bandwidth of a node (Gbit/s)", (-2, 4, ".3g")),
    "microseconds": ("latency of a message (µs)", (-1, 5, ".3g")),
    "teraflops": ("arithmetic of a worker (TFLOP/s)", (-2, 3, ".3g")),
}


@dataclass(frozen=True)
class Choices:
    """The values of the sliders."""

    parameters: float = 124e6  # of the model
    batch: int = 16  # sequences per worker and step
    workers: int = 64
    workers_per_host: int = 4  # GPUs per node; they share the node's link
    gigabits_per_second: float = 10.0  # bandwidth of a node's link
    microseconds: float = 20.0  # latency of a message between nodes
    overlap: float = 0.8  # share of the backward pass during which gradients are sent
    teraflops: float = 50.0  # arithmetic that a worker reaches, in 10^12 operations per second
    tokens_per_sequence: int = 512

    @property
    def job(self) -> Job:
        """The work of each worker: the arithmetic of its sequences, forward and backward."""
        flops = flops_per_token(self.parameters) * self.tokens_per_sequence
        seconds = self.batch * (flops / (self.teraflops * 1e12))
        return Job(self.parameters, seconds, self.overlap)

    @property
    def network(self) -> Network:
        """The link between nodes."""
        return Network(self.microseconds * 1e-6, self.gigabits_per_second * GBIT)


GPT2_SMALL = Choices()


def predict(choices: Choices, inside: Network | None) -> dict[str, str]:
    """Return the prediction of the cost model: name -> value with its unit."""
    found = step(choices.job, choices.network, choices.workers, choices.workers_per_host, inside)
    tokens = choices.workers * choices.batch * choices.tokens_per_sequence
    seconds = EngFormatter(unit="s", places=1)
    return {
        "step": seconds(found.seconds),
        "arithmetic": seconds(choices.job.seconds_per_step),
        "allreduce": seconds(found.communication),
        "not overlapped": seconds(found.exposed),
        "efficiency": f"{found.efficiency:.1%}",
        "all workers": f"{tokens / found.seconds:,.0f} tokens/s",
    }


class ScalingLab(BaseWidget):
    """Sliders for a job and a cluster, and the cost model's prediction.

    Args:
        choices: the initial values.
        inside: the link between the workers of one node; None: not the bottleneck.
    """

    def __init__(self, choices: Choices = GPT2_SMALL, inside: Network | None = INSIDE) -> None:
        super().__init__()
        self._start, self.inside = choices, inside
        self.sliders = {name: _slider(name, getattr(choices, name)) for name in SLIDERS}
        self.sliders["overlap"] = labelled(
            widgets.FloatSlider, "overlap (share of backward)", value=choices.overlap, max=1,
            step=0.05, **LOOK,
        )  # fmt: skip
        for slider in self.sliders.values():
            self.on_change(slider, self._changed)
        self.table = widgets.HTML()
        self.picture = widgets.Image(format="png", layout={"max_width": "100%"})
        columns = {"grid_template_columns": "repeat(auto-fit, minmax(min(32em, 100%), 1fr))"}
        sliders = widgets.GridBox(list(self.sliders.values()), layout=columns)
        self.children = [sliders, self.table, self.picture, self.message]
        self.update()
        self.draw()

    @property
    def choices(self) -> Choices:
        """The current values of the sliders."""
        return replace(self._start, **{name: one.value for name, one in self.sliders.items()})

    def plot(self) -> Plot:
        """Return the figure for the current values, for pages without a kernel."""
        now = self.choices
        return plot_scaling(
            now.job, now.network, now.workers, now.workers_per_host, self.inside, THRESHOLD
        )

    def update(self) -> None:
        """Write the prediction for the current values."""
        found = predict(self.choices, self.inside)
        label = "predicted step of all workers"
        table = html_table(label, list(found), [list(found.values())])
        self.table.value = f"<div role='status'>{table}</div>"
        self.message.value = ""

    def draw(self) -> None:
        """Draw the figure for the current values."""
        self.picture.value = self.plot().png()

    def __repr__(self) -> str:
        """Describe the widget for pages without a kernel."""
        return f"scaling lab: {self.choices}"

    def _changed(self) -> None:
        """Write at once; draw after the last change, because a figure takes far longer."""
        self.update()
        self.cancel_task()
        self.start_task(self._draw_soon)

    async def _draw_soon(self) -> None:
        await asyncio.sleep(DRAWING_DELAY)
        self.draw()


def _slider(name: str, value: float) -> Any:
    """Make a slider at a value, or at the nearest one of its range."""
    description, span = SLIDERS[name]
    if isinstance(span, list):
        nearest = min(span, key=lambda one: abs(one - value))
        return labelled(widgets.SelectionSlider, description, options=span, value=nearest, **LOOK)
    low, high, readout = span
    return labelled(
        widgets.FloatLogSlider, description, min=low, max=high, value=value, step=0.05,
        readout_format=readout, **LOOK,
    )  # fmt: skip
