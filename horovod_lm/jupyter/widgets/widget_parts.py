"""What the widgets share: inputs, buttons, error messages, and whether a page shows a widget.

JupyterLab does not show an exception in a widget's callback or background task, so each of them
runs through a `Message`, which shows the error in the widget.
"""

from __future__ import annotations

import asyncio
import base64
import html
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import traitlets

if TYPE_CHECKING:
    from horovod_lm.jupyter.plots import Plot

PING_INTERVAL, PING_TIMEOUT = 5.0, 20.0  # seconds


def labelled(kind: type[widgets.Widget], description: str, **traits: Any) -> widgets.Widget:
    """Make an input with a description that is not cut off; `width` is a CSS length."""
    layout = {"width": traits.pop("width")} if "width" in traits else {}
    return kind(
        description=description, style={"description_width": "initial"}, layout=layout, **traits
    )


def row(*parts: widgets.Widget) -> widgets.HBox:
    """Make a row that wraps on a narrow page."""
    return widgets.HBox(parts, layout={"flex_flow": "row wrap", "align_items": "center"})


def frontend(name: str) -> str:
    """Return the text of a file in `frontend/`."""
    return (files("horovod_lm.jupyter.widgets") / "frontend" / name).read_text(encoding="utf-8")


def html_table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of plain texts; `label` is for screen readers."""
    header = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>"
        for values in rows
    )
    return (
        f"<div style='overflow-x: auto'><table aria-label='{html.escape(label)}'"
        " style='text-align: right; border-spacing: 1em 0; font-variant-numeric: tabular-nums'>"
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def with_picture(bundle: dict[str, Any], plot: Plot) -> dict[str, Any]:
    """Add a picture to a widget's MIME bundle, for pages without a kernel."""
    picture = base64.b64encode(plot.png()).decode()
    return {**bundle, "text/plain": repr(plot), "image/png": picture}


class ViewTracker(anywidget.AnyWidget):
    """An invisible widget that tracks whether any page shows it, and the widget that holds it.

    A page reports when a view opens and closes. A closed browser tab reports nothing: background
    work calls `ping` now and then, and pages that do not answer count as closed.

    Args:
        on_closed: called when the last view has closed.
        on_opened: called when the first view opens.
    """

    _esm = frontend("view_tracker.js")
    pings = traitlets.Int(0, help="number of pings; pages answer each").tag(sync=True)

    def __init__(
        self, on_closed: Callable[[], None], on_opened: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._on_opened, self._on_closed = on_opened, on_closed
        self._views = 0
        self._pinged_at = 0.0
        self._unanswered_since: float | None = None
        self.on_msg(self._receive)

    def ping(self) -> None:
        """Ping the pages, at most every `PING_INTERVAL`; to be called often."""
        now = time.monotonic()
        if not self._views or now - self._pinged_at < PING_INTERVAL:
            return
        if self._unanswered_since is None:
            self._unanswered_since = now
        if now - self._unanswered_since > PING_TIMEOUT:
            self._set_views(0)
            return
        self._pinged_at = now
        self.pings += 1

    def _receive(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        self._unanswered_since = None
        kind = content.get("kind")
        if kind == "opened" or (kind == "pong" and not self._views):  # after a lost connection
            self._set_views(self._views + 1)
        elif kind == "closed" and self._views:
            self._set_views(self._views - 1)

    def _set_views(self, views: int) -> None:
        before, self._views = self._views, views
        if not before and views:
            self._on_opened()
        elif before and not views:
            self._on_closed()


class Message(widgets.HTML):
    """A line that shows a widget's state and its errors."""

    def say(self, text: str, preformatted: str = "") -> None:
        """Show plain text, and a preformatted text below it."""
        below = f"<pre>{html.escape(preformatted)}</pre>" if preformatted else ""
        self.value = html.escape(text) + below

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Show an exception that is raised inside, and continue."""
        try:
            yield
        except Exception as error:
            self.value = f"<b role='alert'>{html.escape(f'{type(error).__name__}: {error}')}</b>"

    def guarded(self, act: Callable[..., None]) -> Callable[..., None]:
        """Return a callback that shows its errors."""

        def callback(*arguments: Any) -> None:
            with self.errors_shown():
                act(*arguments)

        return callback

    def start(
        self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any
    ) -> asyncio.Task[None]:
        """Start a task of the kernel's event loop that shows its errors."""

        async def task() -> None:
            with self.errors_shown():
                await work(*arguments)

        return asyncio.ensure_future(task())

    def button(
        self, description: str, icon: str, tooltip: str, act: Callable[[], None], **layout: str
    ) -> widgets.Button:
        """Make a button whose errors are shown here."""
        made = widgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
        made.on_click(self.guarded(lambda _: act()))
        return made
