"""What the widgets share: labels that are not cut off, errors that are seen, and an end.

JupyterLab shows nothing of an exception in a widget's callback, so every callback goes through a
`Message`, which says it in the widget.
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import traitlets

if TYPE_CHECKING:
    from horovod_lm.jupyter.plots import Plot

SECONDS_BETWEEN_QUESTIONS, SECONDS_TO_ANSWER = 5.0, 20.0
WRAPPED = {"flex_flow": "row wrap", "align_items": "center"}  # a row that fits a narrow page


def labelled(kind: type[widgets.Widget], description: str, **traits: Any) -> widgets.Widget:
    """Make an input whose description is shown whole and read out by a screen reader."""
    layout = traits.pop("layout", {})
    return kind(
        description=description, style={"description_width": "initial"}, layout=layout, **traits
    )


def frontend(name: str) -> str:
    """Return a file of `frontend/`: it travels to the browser inside the widget."""
    return (files("horovod_lm.jupyter") / "frontend" / name).read_text(encoding="utf-8")


def button(
    message: Message, description: str, icon: str, tooltip: str, act: Callable[[], None],
    **layout: str,
) -> widgets.Button:  # fmt: skip
    """Make a button that does something; what goes wrong is shown in the message."""
    made = widgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
    made.on_click(message.guarded(lambda _: act()))
    return made


def with_still(bundle: dict[str, Any], still: Plot) -> dict[str, Any]:
    """Add to what a widget gives a page the picture that stays when there is no kernel."""
    return {
        **bundle,
        "text/plain": repr(still),
        "image/png": base64.b64encode(still.png()).decode(),
    }


class Presence(anywidget.AnyWidget):
    """Knows whether a page shows it, and with it the widget that it is a part of.

    A page says when it begins and ends to show it, but who closes a tab or a browser says nothing:
    what works in the background asks now and then whether somebody is still there.

    Args:
        on_closed: called when the last place that showed it is gone.
        on_opened: called when a place shows it and none did.
    """

    _esm = frontend("presence.js")
    question = traitlets.Int(0, help="a page answers each new one").tag(sync=True)

    def __init__(
        self, on_closed: Callable[[], None], on_opened: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._on_opened, self._on_closed = on_opened, on_closed
        self._views = 0
        self._asked_at = 0.0
        self._unanswered_since: float | None = None
        self.on_msg(self._heard)

    def ask(self) -> None:
        """Ask a page that has shown it, if it is time; where no answer comes, it is gone.

        To be called often.
        """
        now = time.monotonic()
        if not self._views or now - self._asked_at < SECONDS_BETWEEN_QUESTIONS:
            return
        if self._unanswered_since is None:
            self._unanswered_since = now
        if now - self._unanswered_since > SECONDS_TO_ANSWER:
            self._views = 0
            self._on_closed()
            return
        self._asked_at = now
        self.question += 1

    def _heard(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        self._unanswered_since = None
        is_back = content.get("kind") == "here" and not self._views  # after a lost connection
        if content.get("kind") == "opened" or is_back:
            self._views += 1
            if self._views == 1:
                self._on_opened()
        elif content.get("kind") == "closed" and self._views:
            self._views -= 1
            if self._views == 0:
                self._on_closed()


class Message(widgets.HTML):
    """A line in which a widget says how it stands and what went wrong."""

    def say(self, text: str, printed: str = "") -> None:
        """Show plain text, and under it what something has printed, line by line."""
        below = f"<pre>{html.escape(printed)}</pre>" if printed else ""
        self.value = html.escape(text) + below

    def show_error(self, error: BaseException) -> None:
        """Show an error, by its name and in its own words."""
        self.value = f"<b role='alert'>{html.escape(f'{type(error).__name__}: {error}')}</b>"

    @contextmanager
    def errors_shown(self):
        """Show whatever goes wrong inside, and go on."""
        try:
            yield
        except Exception as error:
            self.show_error(error)

    def guarded(self, act: Callable[..., None]) -> Callable[..., None]:
        """Return a callback that shows its errors."""

        def callback(*arguments: Any) -> None:
            with self.errors_shown():
                act(*arguments)

        return callback

    async def guard(self, work: Awaitable[None]) -> None:
        """Wait for work and show its error."""
        with self.errors_shown():
            await work
