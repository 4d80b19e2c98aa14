"""A widget that predicts step time and efficiency for a job and a cluster chosen with sliders.

lab = ScalingLab()    # GPT-2 small on a network of 10 Gbit/s
lab.plot()            # a figure, for pages without a kernel
"""

from __future__ import annotations

import asyncio
import html
import math
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as widgets
from matplotlib.ticker import EngFormatter

from horovod_lm.analysis.scaling import (
    GBIT,
    Job,
    Network,
    breaking_point,
    flops_per_token,
    smallest_batch,
    step,
)
from horovod_lm.jupyter.plots import Plot, plot_scaling
from horovod_lm.jupyter.widgets.widget_parts import BaseWidget, html_table, labelled

INSIDE = Network(latency=5e-6, bandwidth=25e9)  # between GPUs of one node, over PCIe 4.0 x16
THRESHOLD = 0.9  # efficiency; what Horovod's authors published for their best models
MICROSECOND = 1e-6
DRAWING_DELAY = 0.05  # seconds after the last change
# Slider -> description and range: exponents of ten and the readout format, or a list of values.
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
    def seconds_per_sequence(self) -> float:
        """Arithmetic of one sequence on one worker, forward and backward."""
        flops = flops_per_token(self.parameters) * self.tokens_per_sequence
        return flops / (self.teraflops * 1e12)

    @property
    def job(self) -> Job:
        """The work of each worker."""
        return Job(self.parameters, self.batch * self.seconds_per_sequence, self.overlap)

    @property
    def network(self) -> Network:
        """The link between nodes."""
        return Network(self.microseconds * MICROSECOND, self.gigabits_per_second * GBIT)


GPT2_SMALL = Choices()


def predict(choices: Choices, inside: Network | None = INSIDE) -> dict[str, str]:
    """Return the prediction of the cost model: name -> value with its unit.

    Args:
        choices: the job and the cluster.
        inside: the link between the workers of one node; None: not the bottleneck.
    """
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


def explain(choices: Choices, inside: Network | None = INSIDE) -> list[str]:
    """Return sentences: where the job stops to scale, and what would help."""
    job, network, workers = choices.job, choices.network, choices.workers
    cluster = choices.workers_per_host, inside
    limit = breaking_point(job, network, *cluster, THRESHOLD)
    if limit is None:
        said = [f"Efficiency is at least {THRESHOLD:.0%} for any number of workers."]
    else:
        said = [f"From {limit:,} workers on, efficiency is below {THRESHOLD:.0%}."]
    batch = smallest_batch(choices.seconds_per_sequence, job, network, workers, *cluster)
    if workers == 1:
        said.append("One worker does not communicate.")
    elif math.isinf(batch):
        said.append("Without overlap, no batch size hides the communication.")
    else:
        does = "does" if step(job, network, workers, *cluster).exposed == 0 else "does not"
        said.append(
            f"With {workers:,} workers, the backward pass hides the communication from"
            f" {batch:,.1f} sequences per worker on; at {choices.batch:,} it {does}."
        )
    hosts = -(-workers // choices.workers_per_host)
    if hosts == 1:
        return [*said, "All workers are on one node: nothing crosses the network."]
    latency, whole = (network.allreduce_seconds(size, hosts) for size in (0, job.bytes_reduced))
    name, part = ("Latency", latency) if latency > whole / 2 else ("Bandwidth", whole - latency)
    return [*said, f"{name} takes {part / whole:.0%} of the allreduce between nodes."]


class ScalingLab(BaseWidget):
    """Sliders for a job and a cluster, and the cost model's prediction.

    Args:
        choices: the initial values.
        inside: the link between the workers of one node; None: not the bottleneck.
    """

    def __init__(self, choices: Choices = GPT2_SMALL, inside: Network | None = INSIDE) -> None:
        super().__init__()
        self._start, self.inside = choices, inside
        self.sliders = {name: _slider(name, getattr(self._start, name)) for name in SLIDERS}
        self.sliders["overlap"] = _labelled(
            widgets.FloatSlider, "overlap (share of backward)", value=self._start.overlap, max=1,
            step=0.05,
        )  # fmt: skip
        for slider in self.sliders.values():
            self.on_change(slider, self._changed)
        self.table, self.words = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout={"max_width": "100%"})
        columns = {"grid_template_columns": "repeat(auto-fit, minmax(min(32em, 100%), 1fr))"}
        sliders = widgets.GridBox(list(self.sliders.values()), layout=columns)
        self.children = [sliders, self.table, self.words, self.picture, self.message]
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
        said = explain(self.choices, self.inside)
        self.table.value = html_table(
            "predicted step of all workers", list(found), [list(found.values())]
        )
        items = "".join(f"<li>{html.escape(one)}</li>" for one in said)
        self.words.value = f"<ul role='status'>{items}</ul>"
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


def _labelled(kind: type[widgets.Widget], description: str, **traits: Any) -> Any:
    """Make a slider that waits for the end of a move; all descriptions have the same width."""
    return labelled(kind, description, "auto", "18em", continuous_update=False, **traits)


def _slider(name: str, value: float) -> Any:
    """Make a slider at a value, or at the nearest one of its range."""
    description, span = SLIDERS[name]
    if isinstance(span, list):
        nearest = min(span, key=lambda one: abs(one - value))
        return _labelled(widgets.SelectionSlider, description, options=span, value=nearest)
    low, high, readout = span
    value = min(max(value, 10.0**low), 10.0**high)
    return _labelled(
        widgets.FloatLogSlider, description, min=low, max=high, value=value, step=0.05,
        readout_format=readout,
    )  # fmt: skip
