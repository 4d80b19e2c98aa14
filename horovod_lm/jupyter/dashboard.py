"""A training run, watched: progress, curves, a row for each rank, and a Stop that works.

job = launch("configs/tiny.yaml", np=2)
job.dashboard()

Dashboard("runs/first")        # a run of the past, or one that was started in a terminal
"""

from __future__ import annotations

import asyncio
import html
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from horovod_lm.jupyter.plots import Plot, plot_progress
from horovod_lm.jupyter.run_view import RunView, open_run
from horovod_lm.jupyter.widget_parts import WRAPPED, Message, Presence, button, with_still

if TYPE_CHECKING:
    from horovod_lm.jupyter.launch import TrainingJob

SECONDS_BETWEEN_LOOKS = 0.5
# A picture costs the kernel far more than a line of text, so it is drawn as rarely as keeps all
# pictures together below one part in so many.
DRAWING_SHARE = 30
LAST_LINES = 12


def rank_table(rows: list[dict[str, str]]) -> str:
    """Return the ranks' rows as a table in HTML."""
    if not rows:
        return "<p>no rank has said anything yet</p>"
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return (
        "<div style='overflow-x: auto'>"
        "<table aria-label='ranks: step, milliseconds of a step by phase, memory, state'"
        " style='text-align: right; border-spacing: 1em 0; font-variant-numeric: tabular-nums'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Dashboard(widgets.VBox):
    """A run, watched; it shows itself at the end of a cell.

    It looks at the run's files as long as a page shows it; the run needs no dashboard to go on.

    Args:
        run: a `TrainingJob`, or the folder of a run.

    Raises:
        ConfigError: the folder holds no run.
    """

    _task: asyncio.Task[None] | None = None  # while it watches, and after

    def __init__(self, run: TrainingJob | str | Path) -> None:
        self._job = None if isinstance(run, (str, Path)) else run
        if self._job is None:
            self.view = open_run(run)
        else:
            self.view = RunView(self._job.run.run_dir, self._job.run.log_dir)
        self._drawn_at, self._drawing_took, self._drawn_step = 0.0, 0.0, -1
        self._make_parts()
        row = widgets.HBox([self.bar, self.stop], layout=WRAPPED)
        super().__init__(
            [row, self.headline, self.picture, self.ranks, self.message, self._presence]
        )
        self.look()
        self._watch()

    @property
    def is_live(self) -> bool:
        """Whether the run may still change."""
        if self._job is not None:
            return self._job.is_running
        return self.view.is_running or self.view.is_starting

    @property
    def is_watching(self) -> bool:
        """Whether it looks again and again."""
        return self._task is not None and not self._task.done()

    def look(self) -> None:
        """Show how the run stands now."""
        live = self.is_live  # asked first: what comes after it is the last word
        self.view.update()
        self.bar.max, self.bar.value = max(1, self.view.total_steps), self.view.step
        self.headline.value = html.escape(self.view.headline()).replace("   ", " &emsp; ")
        self.ranks.value = rank_table(self.view.rank_rows())
        if not live:
            self._end()
        due = time.monotonic() - self._drawn_at > DRAWING_SHARE * self._drawing_took
        if self.view.rows and self.view.step != self._drawn_step and (due or not live):
            self._draw()

    def still(self) -> Plot:
        """Return the curves so far, for readers without a kernel."""
        return plot_progress(self.view.rows, self.view.run_dir.name, self.view.floor)

    def close(self) -> None:
        """Stop watching; the run goes on."""
        self._leave()
        super().close()

    def __repr__(self) -> str:
        """Say what it is, the same at every execution."""
        return f"dashboard of the run {self.view.run_dir.name}"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Give a page the widget, and the picture of it that stays when there is no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        return with_still(bundle, self.still()) if self.view.rows else bundle

    # ---- inside ---------------------------------------------------------------------------------

    def _make_parts(self) -> None:
        self.bar = widgets.IntProgress(
            min=0, max=1, description="progress", layout={"width": "60%"}
        )
        self.headline, self.ranks, self.message = widgets.HTML(), widgets.HTML(), Message()
        # Hidden until there is something to draw: a browser shows an empty picture as a broken one.
        self.picture = widgets.Image(format="png", layout={"max_width": "100%", "display": "none"})
        self.stop = button(
            self.message, "Stop", "stop", "end every rank after its step, and save", self._stop
        )
        self._presence = Presence(
            on_opened=self.message.guarded(self._come_back), on_closed=self._leave
        )

    def _watch(self) -> None:
        """Begin to look again and again, unless it does or there will be nothing new."""
        if self.is_live and not self.is_watching:
            self._task = asyncio.ensure_future(self._look_again_and_again())

    async def _look_again_and_again(self) -> None:
        live = True
        while live:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            self._presence.ask()
            with self.message.errors_shown():
                live = self.is_live  # asked first: the last look is at a run that has ended
                self.look()

    def _come_back(self) -> None:
        """A page shows it, perhaps again: what has happened meanwhile is to be seen."""
        if not self.is_watching:
            self.look()
            self._watch()

    def _leave(self) -> None:
        """No page shows it any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _draw(self) -> None:
        started = time.thread_time()  # of this thread: how busy the machine is does not count
        self.picture.value = self.still().png()
        self.picture.layout.display = ""
        self._drawing_took = time.thread_time() - started
        self._drawn_at, self._drawn_step = time.monotonic(), self.view.step

    def _stop(self) -> None:
        if self._job is not None:
            self._job.ask_to_stop()
        else:
            self.view.ask_to_stop()
        # After the asking: where that fails, the button can be pressed again.
        self.stop.disabled, self.stop.description = True, "Stopping"
        self.message.say("asked to stop: every rank finishes its step, and rank 0 saves")

    def _end(self) -> None:
        self.stop.disabled, self.stop.description = True, "Ended"
        error = self._job.error if self._job is not None else None
        words = self._job.status if self._job is not None else self.view.end_in_words()
        last = error.trace.splitlines()[-LAST_LINES:] if error is not None else []
        self.message.say(words, printed="\n".join(last))
        is_whole = self.view.step >= self.view.total_steps > 0
        self.bar.bar_style = "danger" if error is not None else "success" if is_whole else "warning"
