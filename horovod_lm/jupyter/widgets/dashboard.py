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
from typing import Any, Protocol

import ipywidgets as widgets

from horovod_lm.jupyter.plots import Plot, plot_metrics
from horovod_lm.jupyter.widgets.dashboard_view import RunView, open_run
from horovod_lm.jupyter.widgets.widget_parts import (
    Message,
    ViewTracker,
    html_table,
    row,
    with_picture,
)
from horovod_lm.training.run_dir import RunFolder

POLL_INTERVAL = 0.5  # seconds
DRAWING_SHARE = 30  # drawing the curves takes at most 1 part in so many of the time
LAST_LINES = 12  # of a failed rank's traceback


class Job(Protocol):
    """The part of `TrainingJob` that a dashboard uses."""

    run: RunFolder

    @property
    def is_running(self) -> bool: ...

    @property
    def status(self) -> str: ...

    @property
    def error(self) -> Any: ...

    def ask_to_stop(self) -> None: ...


class Dashboard(widgets.VBox):
    """The state of a run, updated while it runs and a page shows it.

    Args:
        run: a `TrainingJob`, or the folder of a run.

    Raises:
        ConfigError: the folder holds no run.
    """

    _task: asyncio.Task[None] | None = None

    def __init__(self, run: Job | str | Path) -> None:
        self._job: Job | None = None
        if isinstance(run, (str, Path)):
            self.view = open_run(run)
        else:
            self._job, self.view = run, RunView(run.run.run_dir, run.run.log_dir)
        self._drawn_at, self._drawing_took, self._drawn_step = 0.0, 0.0, -1
        self.bar = widgets.IntProgress(max=1, description="progress", layout={"width": "60%"})
        self.headline, self.ranks, self.message = widgets.HTML(), widgets.HTML(), Message()
        # Hidden until it is drawn: a browser shows an empty picture as a broken one.
        self.picture = widgets.Image(format="png", layout={"max_width": "100%", "display": "none"})
        self.stop = self.message.button(
            "Stop", "stop", "end every rank after its step, and save", self._stop
        )
        self._tracker = ViewTracker(
            on_opened=self.message.guarded(self._start_polling), on_closed=self._stop_polling
        )
        parts = [self.headline, self.picture, self.ranks, self.message, self._tracker]
        super().__init__([row(self.bar, self.stop), *parts])
        self._start_polling()

    @property
    def is_live(self) -> bool:
        """Whether the run may still change."""
        if self._job is not None:
            return self._job.is_running
        return self.view.is_running or self.view.is_starting

    @property
    def is_polling(self) -> bool:
        """Whether the dashboard updates itself."""
        return self._task is not None and not self._task.done()

    def update(self) -> None:
        """Show the current state of the run."""
        live = self.is_live  # before reading: the last update must see the end of the files
        self.view.update()
        self.bar.max, self.bar.value = max(1, self.view.total_steps), self.view.step
        self.headline.value = html.escape(self.view.headline()).replace("   ", " &emsp; ")
        rows = self.view.rank_rows()
        label = "ranks: step, milliseconds of a step by phase, memory, state"
        self.ranks.value = (
            html_table(label, list(rows[0]), [list(one.values()) for one in rows])
            if rows
            else "<p>no events of any rank yet</p>"
        )
        if not live:
            self._show_end()
        due = time.monotonic() - self._drawn_at > DRAWING_SHARE * self._drawing_took
        if self.view.rows and self.view.step != self._drawn_step and (due or not live):
            self._draw()

    def plot(self) -> Plot:
        """Return the curves so far, for pages without a kernel."""
        name, entropy = self.view.run_dir.name, self.view.entropy
        columns = ["loss", "learning_rate", "tokens_per_second"]
        levels = {"exact entropy of the stories": entropy} if entropy is not None else None
        return plot_metrics({name: self.view.rows}, name, columns, levels)

    def close(self) -> None:
        """Remove the widget; the run continues."""
        self._stop_polling()
        super().close()

    def __repr__(self) -> str:
        """Describe the widget for pages without a kernel."""
        return f"dashboard of the run {self.view.run_dir.name}"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        return with_picture(bundle, self.plot()) if self.view.rows else bundle

    def _start_polling(self) -> None:
        if not self.is_polling:
            self.update()
            if self.is_live:
                self._task = self.message.start(self._poll)

    async def _poll(self) -> None:
        live = True
        while live:
            await asyncio.sleep(POLL_INTERVAL)
            self._tracker.ping()
            with self.message.errors_shown():
                live = self.is_live  # before the update: the last one must see the end
                self.update()

    def _stop_polling(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _draw(self) -> None:
        started = time.thread_time()  # of this thread: the load of the machine does not count
        self.picture.value = self.plot().png()
        self.picture.layout.display = ""
        self._drawing_took = time.thread_time() - started
        self._drawn_at, self._drawn_step = time.monotonic(), self.view.step

    def _stop(self) -> None:
        (self._job or self.view).ask_to_stop()
        # Afterwards: if that fails, the button can be pressed again.
        self.stop.disabled, self.stop.description = True, "Stopping"
        self.message.say("asked to stop: every rank finishes its step, and rank 0 saves")

    def _show_end(self) -> None:
        self.stop.disabled, self.stop.description = True, "Ended"
        error = self._job.error if self._job is not None else None
        words = self._job.status if self._job is not None else self.view.describe_end()
        last = error.trace.splitlines()[-LAST_LINES:] if error is not None else []
        self.message.say(words, preformatted="\n".join(last))
        is_complete = self.view.step >= self.view.total_steps > 0
        self.bar.bar_style = "danger" if error else "success" if is_complete else "warning"
