"""A widget that predicts step time and efficiency for a job and a cluster chosen with sliders.

ScalingLab()                                       # GPT-2 small on a network of 10 Gbit/s

rows = read_measurements("../tests/benchmarks/allreduce_over_links.csv", megabits_per_second=100)
lab = ScalingLab(measurements=rows)                # starts at the network that fits them
lab.plot()                                         # a figure, for pages without a kernel
"""

from __future__ import annotations

import asyncio
import csv
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from matplotlib.ticker import EngFormatter

from horovod_lm.analysis.scaling import (
    GBIT,
    Job,
    Measurement,
    Network,
    breaking_point,
    fit_network,
    flops_per_token,
    smallest_batch,
    step,
)
from horovod_lm.jupyter.plots import Plot, plot_scaling
from horovod_lm.jupyter.widgets.widget_parts import Message, html_table
from horovod_lm.utils.errors import UserError

INSIDE = Network(latency=5e-6, bandwidth=25e9)  # between GPUs of one node, over PCIe 4.0 x16
THRESHOLD = 0.9  # efficiency; what Horovod's authors published for their best models
MICROSECOND = 1e-6
MIN_MEASURED_SIZE = 2**20  # bytes
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
    """The values of the sliders.

    Attributes:
        parameters: of the model.
        batch: sequences per worker and step.
        workers: number of workers.
        workers_per_host: GPUs per node; they share the node's link.
        gigabits_per_second: bandwidth of a node's link.
        microseconds: latency of a message between nodes.
        overlap: share of the backward pass during which gradients are sent, 0 to 1.
        teraflops: arithmetic that a worker reaches, in 10^12 operations per second.
        tokens_per_sequence: length of a sequence.
    """

    parameters: float = 124e6
    batch: int = 16
    workers: int = 64
    workers_per_host: int = 4
    gigabits_per_second: float = 10.0
    microseconds: float = 20.0
    overlap: float = 0.8
    teraflops: float = 50.0
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
    job, network = choices.job, choices.network
    cluster = choices.workers_per_host, inside
    limit = breaking_point(job, network, *cluster, THRESHOLD)
    if limit is None:
        said = [f"Efficiency is at least {THRESHOLD:.0%} for any number of workers."]
    else:
        said = [f"From {limit:,} workers on, efficiency is below {THRESHOLD:.0%}."]
    batch = smallest_batch(choices.seconds_per_sequence, job, network, choices.workers, *cluster)
    exposed = step(job, network, choices.workers, *cluster).exposed
    if choices.workers == 1:
        said.append("One worker does not communicate.")
    elif math.isinf(batch):
        said.append("Without overlap, no batch size hides the communication.")
    else:
        said.append(
            f"With {choices.workers:,} workers, the backward pass hides the communication from"
            f" {batch:,.1f} sequences per worker on; at {choices.batch:,} it"
            f" {'does' if exposed == 0 else 'does not'}."
        )
    hosts = -(-choices.workers // choices.workers_per_host)
    if hosts == 1:
        said.append("All workers are on one node: nothing crosses the network.")
    else:
        latency, whole = (network.allreduce_seconds(size, hosts) for size in (0, job.bytes_reduced))
        name, part = ("Latency", latency) if latency > whole / 2 else ("Bandwidth", whole - latency)
        said.append(f"{name} takes {part / whole:.0%} of the allreduce between nodes.")
    return said


def read_measurements(
    path: str | Path, megabits_per_second: int, smallest: float = MIN_MEASURED_SIZE
) -> list[Measurement]:
    """Read the allreduces that tests/benchmarks/allreduce_over_links.py measured over one link.

    Args:
        path: its CSV file.
        megabits_per_second: the bandwidth of the link.
        smallest: bytes; shorter messages are left out. The benchmark's links do not limit the first
            256 KiB, so short messages say nothing about the bandwidth.

    Raises:
        UserError: the file holds no measurement of that bandwidth.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [
        Measurement(float(one["bytes"]), int(one["workers"]), float(one["seconds"]))
        for one in rows
        if int(one["megabits_per_second"]) == megabits_per_second
        and float(one["bytes"]) >= smallest
    ]
    if not found:
        rates = sorted({int(one["megabits_per_second"]) for one in rows})
        raise UserError(
            f"{path} holds no allreduce at {megabits_per_second} Mbit/s: choose one of"
            f" {', '.join(map(str, rates))}"
        )
    return found


class ScalingLab(widgets.VBox):
    """Sliders for a job and a cluster, and the cost model's prediction.

    Args:
        choices: the initial values. None: GPT-2 small on 64 GPUs; with measurements, on the network
            that fits them.
        measurements: allreduces to draw beside the prediction, from `read_measurements` or your
            own; one host for each worker.
        inside: the link between the workers of one node; None: not the bottleneck.

    Raises:
        ValueError: the measurements do not determine the network (see `fit_network`).
    """

    _drawing: asyncio.Task[None] | None = None

    def __init__(
        self,
        choices: Choices | None = None,
        measurements: Sequence[Measurement] = (),
        inside: Network | None = INSIDE,
    ) -> None:
        self.measurements, self.inside = tuple(measurements), inside
        if choices is None and measurements:
            fitted = fit_network(measurements)
            choices = Choices(
                gigabits_per_second=fitted.bandwidth / GBIT,
                microseconds=fitted.latency / MICROSECOND,
            )
        self._start = choices or Choices()
        self.sliders = {name: _slider(name, getattr(self._start, name)) for name in SLIDERS}
        self.sliders["overlap"] = widgets.FloatSlider(
            self._start.overlap, min=0, max=1, step=0.05, description="overlap (share of backward)",
            **_STYLE,
        )  # fmt: skip
        self.table, self.words, self.message = widgets.HTML(), widgets.HTML(), Message()
        for slider in self.sliders.values():
            slider.observe(self.message.guarded(self._changed), "value")
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        columns = "repeat(auto-fit, minmax(min(32em, 100%), 1fr))"
        sliders = widgets.GridBox(
            list(self.sliders.values()), layout=widgets.Layout(grid_template_columns=columns)
        )
        super().__init__([sliders, self.table, self.words, self.picture, self.message])
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
            now.job, now.network, now.workers, now.workers_per_host, self.inside,
            self.measurements, THRESHOLD,
        )  # fmt: skip

    def update(self) -> None:
        """Write the prediction for the current values."""
        found = predict(self.choices, self.inside)
        words = "".join(
            f"<li>{html.escape(one)}</li>" for one in explain(self.choices, self.inside)
        )
        label = "predicted step of all workers"
        self.table.value = html_table(label, list(found), [list(found.values())])
        self.words.value = f"<ul role='status'>{words}</ul>"
        self.message.value = ""

    def draw(self) -> None:
        """Draw the figure for the current values."""
        self.picture.value = self.plot().png()

    def close(self) -> None:
        """Stop drawing and remove the widget."""
        if self._drawing is not None:
            self._drawing.cancel()
        super().close()

    def __repr__(self) -> str:
        """Describe the widget for pages without a kernel."""
        return f"scaling lab: {self.choices}"

    def _changed(self, _: Any) -> None:
        """Write at once; draw after the last change, because a figure takes far longer."""
        self.update()
        if self._drawing is not None:
            self._drawing.cancel()
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # a plain script without an event loop
            self.draw()
        else:
            self._drawing = self.message.start(self._draw_soon)

    async def _draw_soon(self) -> None:
        await asyncio.sleep(DRAWING_DELAY)
        self.draw()


_STYLE: dict[str, Any] = {
    "continuous_update": False,
    "style": {"description_width": "18em"},  # the longest description
    "layout": widgets.Layout(width="auto"),
}


def _slider(name: str, value: float) -> widgets.ValueWidget:
    """Make a slider at a value, or at the nearest one of its range."""
    description, span = SLIDERS[name]
    if isinstance(span, list):
        nearest = min(span, key=lambda one: abs(one - value))
        return widgets.SelectionSlider(
            options=span, value=nearest, description=description, **_STYLE
        )
    low, high, readout = span
    return widgets.FloatLogSlider(
        min(max(value, 10.0**low), 10.0**high), min=low, max=high, step=0.05,
        readout_format=readout, description=description, **_STYLE,
    )  # fmt: skip
