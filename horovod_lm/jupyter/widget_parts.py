"""What the widgets share: labels that are not cut off, and errors that are seen.

JupyterLab shows nothing of an exception in a widget's callback, so every callback goes through a
`Message`, which says it in the widget.
"""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import ipywidgets as widgets


def labelled(kind: type[widgets.Widget], description: str, **traits: Any) -> widgets.Widget:
    """Make an input whose description is shown whole and read out by a screen reader."""
    layout = traits.pop("layout", {})
    return kind(
        description=description, style={"description_width": "initial"}, layout=layout, **traits
    )


def frontend(name: str) -> str:
    """Return a file of `frontend/`: it travels to the browser inside the widget."""
    return (files("horovod_lm.jupyter") / "frontend" / name).read_text(encoding="utf-8")


class Message(widgets.HTML):
    """A line in which a widget says how it stands and what went wrong."""

    def say(self, text: str) -> None:
        """Show plain text."""
        self._show(html.escape(text))

    def show_error(self, error: BaseException) -> None:
        """Show an error, by its name and in its own words."""
        self._show(f"<b role='alert'>{html.escape(f'{type(error).__name__}: {error}')}</b>")

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

    def _show(self, text: str) -> None:
        if self.value != text:  # an equal value would be sent all the same
            self.value = text
