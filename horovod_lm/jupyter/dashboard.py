"""A training run, watched: progress, curves, a row for each rank, and a Stop that works.

job = launch("configs/tiny.yaml", np=2)
job.dashboard()

Dashboard("runs/first")        # a run of the past, or one that was started in a terminal
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as widgets

from horovod_lm.jupyter.plots import Plot, draw_loss
from horovod_lm.jupyter.run_view import RunView, open_run

if TYPE_CHECKING:
    from horovod_lm.jupyter.launch import TrainingJob

SECONDS_BETWEEN_LOOKS = 0.5
# A picture costs the kernel far more than a line of text, so it is drawn as rarely as keeps all
# pictures together below one part in so many.
DRAWING_SHARE = 30
LAST_LINES = 12


def plot_progress(view: RunView, title: str = "") -> Plot:
    """Draw a run's loss, learning rate and speed so far, side by side.

    Args:
        view: the run.
        title: its name.
    """
    plot = Plot(f"loss, learning rate and speed of {title or view.run_dir.name}", 10.0, 3.0)
    loss, rate, speed = plot.subplots(1, 3, width_ratios=(2, 1, 1))
    training = [row for row in view.rows if row["phase"] == "train"]
    if not training:
        return plot
    steps = [row["step"] for row in training]
    levels = {"entropy of the stories": view.floor} if view.floor else None
    draw_loss(loss, {view.run_dir.name: view.rows}, "Loss", levels)
    for axes, name, label in (
        (rate, "learning_rate", "learning rate (per step)"),
        (speed, "tokens_per_second", "speed (tokens per second)"),
    ):
        axes.plot(steps, [row[name] for row in training], linewidth=1.2, color="#0072B2")
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    return plot


def rank_table(rows: list[dict[str, str]]) -> str:
    """Return the ranks' rows as a table in HTML; the times are milliseconds of a step."""
    if not rows:
        return "<p>no rank has said anything yet</p>"
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return (
        "<table aria-label='ranks: step, milliseconds of a step by phase, memory, state'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


class Dashboard(widgets.VBox):
    """A run, watched; it shows itself at the end of a cell.

    Args:
        run: a `TrainingJob`, or the folder of a run.

    Raises:
        ConfigError: the folder holds no run.
    """

    def __init__(self, run: TrainingJob | str | Path) -> None:
        self._job = None if isinstance(run, (str, Path)) else run
        if self._job is None:
            self.view = open_run(run)
        else:
            self.view = RunView(self._job.run.run_dir, self._job.run.log_dir)
        self.bar = widgets.IntProgress(
            min=0, max=1, description="progress", layout=widgets.Layout(width="60%")
        )
        self.headline = widgets.HTML("waiting for the first step")
        # Hidden until there is something to draw: a browser shows an empty picture as a broken one.
        self.picture = widgets.Image(
            format="png", layout=widgets.Layout(max_width="100%", display="none")
        )
        self.ranks = widgets.HTML()
        self.message = widgets.HTML()
        self.stop = widgets.Button(
            description="Stop", icon="stop", tooltip="end every rank after its step, and save"
        )
        self.stop.on_click(self._shown(self._stop))
        self._drawn_at, self._drawing_took, self._drawn_step = 0.0, 0.0, -1
        self._open = True
        row = widgets.HBox([self.bar, self.stop])
        super().__init__([row, self.headline, self.picture, self.ranks, self.message])
        self.look()
        if self.is_live:
            self._task = asyncio.ensure_future(self._watch())

    @property
    def is_live(self) -> bool:
        """Whether the run may still change."""
        return self._job.is_running if self._job is not None else self.view.is_running

    def look(self) -> None:
        """Show how the run stands now."""
        live = self.is_live  # asked first: what comes after it is the last word
        self.view.update()
        self.bar.max, self.bar.value = max(1, self.view.total_steps), self.view.step
        self._set(self.headline, html.escape(self.view.headline()).replace("   ", " &emsp; "))
        self._set(self.ranks, rank_table(self.view.rank_rows()))
        if not live:
            self._end()
        due = time.monotonic() - self._drawn_at > DRAWING_SHARE * self._drawing_took
        if self.view.rows and self.view.step != self._drawn_step and (due or not live):
            self._draw()

    def close(self) -> None:
        """Stop watching; the run goes on."""
        self._open = False
        super().close()

    # ---- inside ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Look again and again until the run has ended or nobody shows the dashboard."""
        while self._open and self.is_live:
            self._guard(self.look)
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        if self._open:
            self._guard(self.look)

    def _draw(self) -> None:
        started = time.perf_counter()
        self.picture.value = plot_progress(self.view).png()
        self.picture.layout.display = ""
        self._drawing_took = time.perf_counter() - started
        self._drawn_at, self._drawn_step = time.monotonic(), self.view.step

    def _stop(self) -> None:
        self.stop.disabled, self.stop.description = True, "Stopping"
        self._set(self.message, "asked to stop: every rank finishes its step, and rank 0 saves")
        if self._job is not None:
            self._job.ask_to_stop()
        else:
            for rank in self.view.ranks.values():
                process = rank.process()
                if process is not None:
                    process.terminate()

    def _end(self) -> None:
        self.stop.disabled, self.stop.description = True, "Ended"
        error = self._job.error if self._job is not None else None
        words = self._job.status if self._job is not None else "this run has ended"
        text = f"<b>{html.escape(words)}</b>"
        if error is not None and error.trace:
            last = "\n".join(error.trace.splitlines()[-LAST_LINES:])
            text += f"<pre>{html.escape(last)}</pre>"
        self.bar.bar_style = "danger" if error is not None else "success"
        self._set(self.message, text)

    @staticmethod
    def _set(widget: widgets.HTML, text: str) -> None:
        if widget.value != text:  # an equal value would be sent all the same
            widget.value = text

    def _shown(self, act: Callable[[], None]) -> Callable[[object], None]:
        return lambda _: self._guard(act)

    def _guard(self, act: Callable[[], None]) -> None:
        """Show a callback's error in the widget: nobody would see it otherwise."""
        try:
            act()
        except Exception as error:
            self._set(self.message, f"<b>{html.escape(f'{type(error).__name__}: {error}')}</b>")
