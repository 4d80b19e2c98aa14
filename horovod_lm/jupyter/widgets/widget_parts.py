"""What the widgets share: inputs, buttons, errors, background tasks, and text that can be shown.

JupyterLab does not show an exception in a widget's callback or background task, so each of them
runs inside `BaseWidget.errors_shown`.
"""

from __future__ import annotations

import asyncio
import base64
import html
import unicodedata
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.jupyter.plots import Plot

SYMBOLS = {"\n": "↵\n", "\t": "⇥\t", "\x7f": "␡"}
CONTROL_PICTURES = 0x2400  # Unicode's symbols of the 32 control characters of ASCII
# Controls, marks of format and direction, surrogates, unassigned characters, and separators.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
DOTTED_CIRCLE = "◌"  # carries a combining mark that would join the character before it


def labelled(
    kind: type[widgets.Widget], description: str, width: str, label: str = "initial", **traits: Any
) -> Any:
    """Make an input; `width` and `label`, the width of its description, are CSS lengths."""
    style, layout = {"description_width": label}, {"width": width}
    return kind(description=description, style=style, layout=layout, **traits)


def row(*parts: widgets.Widget) -> widgets.HBox:
    """Make a row that wraps on a narrow page."""
    return widgets.HBox(parts, layout={"flex_flow": "row wrap", "align_items": "center"})


def frontend(name: str) -> str:
    """Return the text of a file in `frontend/`."""
    return (files("horovod_lm.jupyter.widgets") / "frontend" / name).read_text(encoding="utf-8")


def html_table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of plain texts; `label` is for screen readers."""
    header = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{html.escape(value)}</td>" for value in values) for values in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<div style='overflow-x: auto'><table aria-label='{html.escape(label)}'"
        " style='text-align: right; border-spacing: 1em 0; font-variant-numeric: tabular-nums'>"
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def with_picture(bundle: dict[str, Any], plot: Plot) -> dict[str, Any]:
    """Add a picture to a widget's MIME bundle, for pages without a kernel."""
    picture = base64.b64encode(plot.png()).decode()
    return {**bundle, "text/plain": repr(plot), "image/png": picture}


def visible(text: str) -> str:
    """Return text with every character visible; a line end still ends the line.

    A control character becomes its symbol (`␛`), any other invisible one its number (`⟨U+202E⟩`),
    so that no text can change the page around it.
    """
    shown = "".join(map(_visible_character, text))
    return DOTTED_CIRCLE + shown if text and unicodedata.category(text[0])[0] == "M" else shown


def visible_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return one token as `visible` text; bytes of an incomplete character become `⟨E2⟩`."""
    return visible(tokenizer.token_bytes(token_id).decode("utf-8", errors="surrogateescape"))


@lru_cache(maxsize=4096)
def _visible_character(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    if character < " ":
        return chr(CONTROL_PICTURES + ord(character))
    if "\udc80" <= character <= "\udcff":  # a byte that was not UTF-8: see `surrogateescape`
        return f"⟨{ord(character) - 0xDC00:02X}⟩"
    if character != " " and unicodedata.category(character) in INVISIBLE:
        return f"⟨U+{ord(character):04X}⟩"
    return character


def has_event_loop() -> bool:
    """Whether an event loop runs in this thread, as it does in Jupyter's kernel."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class BaseWidget(widgets.VBox):
    """A widget with a line for its state and its errors, and at most one background task."""

    _task: asyncio.Task[None] | None = None  # also of a widget whose `__init__` has failed

    def __init__(self) -> None:
        super().__init__()
        self.message = widgets.HTML()

    @property
    def is_busy(self) -> bool:
        """Whether the background task runs."""
        return self._task is not None and not self._task.done()

    def say(self, text: str, preformatted: str = "") -> None:
        """Show plain text, and a preformatted text below it."""
        below = f"<pre>{html.escape(preformatted)}</pre>" if preformatted else ""
        self.message.value = html.escape(text) + below

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Show an exception that is raised inside, and continue."""
        try:
            yield
        except Exception as error:
            words = html.escape(f"{type(error).__name__}: {error}")
            self.message.value = f"<b role='alert'>{words}</b>"

    def guarded(self, act: Callable[..., None]) -> Callable[..., None]:
        """Return a callback that shows its errors."""

        def callback(*arguments: Any) -> None:
            with self.errors_shown():
                act(*arguments)

        return callback

    def on_change(self, control: widgets.Widget, act: Callable[[], None]) -> Any:
        """Call `act` whenever the control's value changes; return the control."""
        control.observe(self.guarded(lambda _: act()), "value")
        return control

    def button(
        self, description: str, icon: str, tooltip: str, act: Callable[[], None], **layout: str
    ) -> widgets.Button:
        """Make a button whose errors are shown."""
        made = widgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
        made.on_click(self.guarded(lambda _: act()))
        return made

    def start_task(
        self,
        work: Callable[..., Coroutine[Any, Any, None]],
        *arguments: Any,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the task in the kernel's event loop; `at_end` is called however it ends.

        Without a running event loop, as in plain IPython, return when the task has ended.
        """

        async def task() -> None:
            with self.errors_shown():
                await work(*arguments)

        if not has_event_loop():
            try:
                asyncio.run(task())
            finally:
                at_end()
            return
        self._task = asyncio.create_task(task())
        # A callback: a task that is cancelled before its first step never runs.
        self._task.add_done_callback(lambda _: at_end())

    def cancel_task(self) -> None:
        """Cancel the task if it runs."""
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Cancel the task and remove the widget."""
        self.cancel_task()
        super().close()
