"""Generated tokens in the browser: coloured, clicked, stepped through by keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from horovod_lm.jupyter.continuation import Continuation
from horovod_lm.jupyter.visible import visible
from horovod_lm.jupyter.widget_parts import Presence, frontend


class TokenView(Presence):
    """A continuation's tokens.

    Args:
        on_select: called with (sample, index) when a token is clicked or stepped to.
        on_closed: called when the last place that showed it is gone.
    """

    _esm = frontend("tokens.js")
    _css = frontend("tokens.css")
    number = traitlets.Int(0, help="which continuation is shown").tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    samples = traitlets.List(help="lists of [text, probability, surprise]").tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    selected = traitlets.List(help="[sample, index], or nothing").tag(sync=True)

    def __init__(
        self, on_select: Callable[[int, int], None], on_closed: Callable[[], None]
    ) -> None:
        super().__init__(on_closed=on_closed)
        self._on_select = on_select

    def show(self, continuation: Continuation, number: int) -> None:
        """Show a continuation as far as it is; `number` says whether it is still the same one."""
        with self.hold_sync():
            if number != self.number:
                self.number, self.selected, self.texts = number, [], []
                self.prompt = visible(continuation.prompt)
            self.samples = [
                [[one.text, f"{one.before:.4g}", round(one.surprise, 3)] for one in sample]
                for sample in continuation.samples
            ]
            if continuation.state != "writing":
                self.texts = [visible(text).replace("↵", "") for text in continuation.texts]

    def _heard(self, widget: Any, content: dict[str, Any], buffers: Any) -> None:
        super()._heard(widget, content, buffers)
        if content.get("kind") == "select":
            self._on_select(int(content["sample"]), int(content["index"]))
