"""Every figure of the course, one module for each subject, all to be imported from here."""

from horovod_lm.jupyter.plots.attention import (
    plot_all_heads,
    plot_attention,
    plot_attention_cost,
)
from horovod_lm.jupyter.plots.data import (
    plot_losses_above_floor,
    plot_shards,
    plot_tokens_per_character,
)
from horovod_lm.jupyter.plots.failures import plot_partings, plot_world
from horovod_lm.jupyter.plots.generation import plot_cost_by_length, plot_next_words
from horovod_lm.jupyter.plots.hosts import plot_allreduce_over_links
from horovod_lm.jupyter.plots.model import plot_depth, plot_influence, plot_pieces
from horovod_lm.jupyter.plots.performance import (
    plot_batches,
    plot_efficiency,
    plot_message_times,
    plot_predictions,
    plot_settings,
    plot_timeline,
)
from horovod_lm.jupyter.plots.ring import plot_ring_steps, plot_sent_by_workers
from horovod_lm.jupyter.plots.scaling import Scene, plot_scaling
from horovod_lm.jupyter.plots.style import RUN_STYLES, Plot
from horovod_lm.jupyter.plots.training import (
    PART_STYLES,
    draw_loss,
    plot_learning_rate,
    plot_loss,
    plot_progress,
    plot_speed,
    plot_step_parts,
    plot_summary,
)

__all__ = [
    "PART_STYLES",
    "RUN_STYLES",
    "Plot",
    "Scene",
    "draw_loss",
    "plot_all_heads",
    "plot_allreduce_over_links",
    "plot_attention",
    "plot_attention_cost",
    "plot_batches",
    "plot_cost_by_length",
    "plot_depth",
    "plot_efficiency",
    "plot_influence",
    "plot_learning_rate",
    "plot_loss",
    "plot_losses_above_floor",
    "plot_message_times",
    "plot_next_words",
    "plot_partings",
    "plot_pieces",
    "plot_predictions",
    "plot_progress",
    "plot_ring_steps",
    "plot_scaling",
    "plot_sent_by_workers",
    "plot_settings",
    "plot_shards",
    "plot_speed",
    "plot_step_parts",
    "plot_summary",
    "plot_timeline",
    "plot_tokens_per_character",
    "plot_world",
]
