"""Every figure of the course; import them from here."""

from horovod_lm.jupyter.plots.charts import Plot, plot_bars, plot_lines
from horovod_lm.jupyter.plots.performance import (
    plot_allreduces,
    plot_scaling,
    plot_timeline,
)
from horovod_lm.jupyter.plots.tables import (
    plot_all_heads,
    plot_attention,
    plot_ring_steps,
    plot_shards,
)
from horovod_lm.jupyter.plots.training import (
    plot_loss,
    plot_metrics,
    plot_resumed_runs,
    plot_step_parts,
    plot_summary,
    plot_world_size,
)

__all__ = [
    "Plot",
    "plot_all_heads",
    "plot_allreduces",
    "plot_attention",
    "plot_bars",
    "plot_lines",
    "plot_loss",
    "plot_metrics",
    "plot_resumed_runs",
    "plot_ring_steps",
    "plot_scaling",
    "plot_shards",
    "plot_step_parts",
    "plot_summary",
    "plot_timeline",
    "plot_world_size",
]
