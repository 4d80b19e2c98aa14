"""A widget that shows a training run: progress, curves, a row for each rank, and a Stop button.

job = launch("configs/tiny.yaml", np=2)
job.dashboard()

Dashboard("runs/first")        # a finished run, or one that was started in a terminal
"""

from __future__ import annotations

import asyncio
import html
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from horovod_lm.jupyter.plots import Plot, plot_metrics
from horovod_lm.jupyter.widgets.dashboard_view import RunView
from horovod_lm.jupyter.widgets.widget_parts import (
    BaseWidget,
    has_event_loop,
    html_table,
    row,
    with_picture,
)
from horovod_lm.utils.errors import ConfigError

if TYPE_CHECKING:
    from horovod_lm.jupyter.launch import TrainingJob

POLL_INTERVAL = 0.5  # seconds
DRAWING_SHARE = 30  # drawing the curves takes at most 1 part in so many of the time
LAST_LINES = 12  # of a failed rank's traceback


class Dashboard(BaseWidget):
    """The state of a run, updated until it ends; without an event loop, as it is now.

    Args:
        run: a `TrainingJob`, or the folder of a run.

    Raises:
        ConfigError: the folder holds no run.
    """

    def __init__(self, run: TrainingJob | str | Path) -> None:
        self._job: TrainingJob | None = None
        if isinstance(run, (str, Path)):
            self.view = RunView(run)
            if not (self.view.run_dir / "config.yaml").is_file():
                raise ConfigError(f"{run} is not a run: it holds no config.yaml")
            self.view.update()
        else:
            self._job, self.view = run, RunView(run.run.run_dir, run.run.log_dir)
        super().__init__()
        self._drawn_at, self._drawing_took, self._drawn_step = 0.0, 0.0, -1
        self.bar = widgets.IntProgress(max=1, description="progress", layout={"width": "60%"})
        self.headline, self.ranks = widgets.HTML(), widgets.HTML()
        # Hidden until it is drawn: a browser shows an empty picture as a broken one.
        self.picture = widgets.Image(format="png", layout={"max_width": "100%", "display": "none"})
        tooltip = "end every rank after its step, and save"
        self.stop = self.button("Stop", "stop", tooltip, self._stop)
        top = row(self.bar, self.stop)
        self.children = [top, self.headline, self.picture, self.ranks, self.message]
        live = self.is_live
        self.update()
        if live and has_event_loop():
            self.start_task(self._poll)

    @property
    def is_live(self) -> bool:
        """Whether the run may still change."""
        if self._job is not None:
            return self._job.is_running
        return self.view.is_running or self.view.is_starting

    def update(self) -> None:
        """Show the current state of the run."""
        live = self.is_live  # before reading: the last update must see the end of the files
        self.view.update()
        self.bar.max, self.bar.value = max(1, self.view.total_steps), self.view.step
        self.headline.value = html.escape(self.view.headline()).replace("   ", " &emsp; ")
        rows = self.view.rank_rows()
        if rows:
            label = "ranks: step, milliseconds of a step by phase, memory, state"
            cells = [list(one.values()) for one in rows]
            self.ranks.value = html_table(label, list(rows[0]), cells)
        else:
            self.ranks.value = "<p>no events of any rank yet</p>"
        if self.view.unreadable:
            names = html.escape(", ".join(sorted(self.view.unreadable)))
            self.ranks.value += f"<p>parts of {names} could not be read and are left out</p>"
        if not live:
            self._show_end()
        due = time.monotonic() - self._drawn_at > DRAWING_SHARE * self._drawing_took
        if self.view.rows and self.view.step != self._drawn_step and (due or not live):
            started = time.thread_time()  # of this thread: the load of the machine does not count
            self.picture.value = self.plot().png()
            self.picture.layout.display = ""
            self._drawing_took = time.thread_time() - started
            self._drawn_at, self._drawn_step = time.monotonic(), self.view.step

    def plot(self) -> Plot:
        """Return the curves so far, for pages without a kernel."""
        name, entropy = self.view.run_dir.name.replace("$", r"\$"), self.view.entropy
        columns = ["loss", "learning_rate", "tokens_per_second"]
        levels = {"exact entropy of the stories": entropy} if entropy is not None else None
        return plot_metrics({name: self.view.rows}, name, columns, levels)

    def __repr__(self) -> str:
        """Describe the widget for pages without a kernel."""
        return f"dashboard of the run {self.view.run_dir.name}"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        return with_picture(bundle, self.plot()) if self.view.rows else bundle

    async def _poll(self) -> None:
        live = True
        while live:
            await asyncio.sleep(POLL_INTERVAL)
            with self.errors_shown():
                live = self.is_live  # before the update: the last one must see the end
                self.update()

    def _stop(self) -> None:
        (self._job or self.view).ask_to_stop()
        # Afterwards: if that fails, the button can be pressed again.
        self.stop.disabled, self.stop.description = True, "Stopping"
        self.say("asked to stop: every rank finishes its step, and rank 0 saves")

    def _show_end(self) -> None:
        self.stop.disabled, self.stop.description = True, "Ended"
        error = self._job.error if self._job is not None else None
        words = self._job.status if self._job is not None else self.view.describe_end()
        self.say(words, "\n".join(error.trace.splitlines()[-LAST_LINES:]) if error else "")
        is_complete = self.view.step >= self.view.total_steps > 0
        self.bar.bar_style = "danger" if error else "success" if is_complete else "warning"
