"""Where each head of a model looks in a sentence, to be hovered over and stepped through.

model, tokenizer, config = load_model_for_generation("runs/my_run")
explorer = AttentionExplorer(model, tokenizer, "Tom lost his red kite.")
explorer                # in a notebook: the widget
explorer.picture()      # the chosen head as a figure, for readers without a kernel
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import traitlets

from horovod_lm.jupyter.attention_map import AttentionMap, read_attention, thumbnails
from horovod_lm.jupyter.plots import Plot, plot_all_heads, plot_attention
from horovod_lm.jupyter.widget_parts import WRAPPED, Message, button, frontend, labelled

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM


class AttentionView(anywidget.AnyWidget):
    """One head's weights as a map and as lines, and every head at a glance.

    Args:
        on_head: called with (layer, head), both from 0, when a head is chosen in the browser.
    """

    _esm = frontend("attention.js")
    _css = frontend("attention.css")
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    grid = traitlets.List([0, 0, 0], help="layers, heads, cells of a thumbnail's side").tag(
        sync=True
    )
    entropy_bits = traitlets.List(help="a list for each layer").tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    weights = traitlets.Bytes(b"", help="the head's (T, T), float32").tag(sync=True)
    thumbnails = traitlets.Bytes(b"", help="(L, H, n, n), a byte each").tag(sync=True)

    def __init__(self, on_head: Callable[[int, int], None]) -> None:
        super().__init__()
        self._on_head = on_head
        self.on_msg(self._heard)

    def show(self, attention: AttentionMap, layer: int, head: int) -> None:
        """Show a head of a map."""
        small = thumbnails(attention.weights)
        with self.hold_sync():
            self.tokens = attention.tokens
            self.grid = list(small.shape[:3])
            self.entropy_bits = [
                [round(one, 4) for one in row] for row in attention.entropy_bits.tolist()
            ]
            self.thumbnails = small.numpy().tobytes()
            self.show_head(attention, layer, head)

    def show_head(self, attention: AttentionMap, layer: int, head: int) -> None:
        """Show another head of the map that is shown."""
        with self.hold_sync():
            self.layer, self.head = layer, head
            self.weights = attention.weights[layer, head].contiguous().numpy().tobytes()

    def _heard(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if content.get("kind") == "head":
            self._on_head(int(content["layer"]), int(content["head"]))


class AttentionExplorer(widgets.VBox):
    """A sentence in; where every head looks, out.

    Args:
        model: any model of this package.
        tokenizer: its tokenizer.
        sentence: what is read first; at most the model's context.

    Attributes:
        attention: the `AttentionMap` that is shown.

    Raises:
        DataError: the sentence is longer than the context.
    """

    def __init__(
        self, model: TransformerLM, tokenizer: Tokenizer, sentence: str = "Once upon a time"
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._task: asyncio.Task[None] | None = None
        self.message = Message()
        self.sentence = labelled(
            widgets.Textarea, "Sentence", value=sentence, rows=2, layout={"width": "auto"}
        )
        self.read = button(
            self.message, "Show", "eye", "read the sentence, and show where heads look", self.start
        )
        self.attention = read_attention(model, tokenizer, sentence)
        self.layer = self._chooser("Layer", self.attention.n_layers)
        self.head = self._chooser("Head", self.attention.n_heads)
        self.view = AttentionView(on_head=self.message.guarded(self.choose))
        row = widgets.HBox([self.read, self.layer, self.head], layout=WRAPPED)
        super().__init__([self.sentence, row, self.message, self.view])
        self._show()

    def start(self) -> None:
        """Read the sentence that the input holds now."""
        if self._task is not None and not self._task.done():
            return
        self.read.disabled = True
        self.message.say("reading")
        self._task = asyncio.ensure_future(self.message.guard(self._read(self.sentence.value)))

    def choose(self, layer: int, head: int) -> None:
        """Show a head; both numbers count from 0."""
        if (self.layer.value, self.head.value) != (layer, head):
            self.layer.value, self.head.value = layer, head
        self.view.show_head(self.attention, layer, head)
        self._say_how_wide()

    def picture(self) -> Plot:
        """Return the chosen head as a figure."""
        layer, head = self.layer.value, self.head.value
        title = f"Layer {layer + 1}, head {head + 1}"
        words = [token.replace("\n", "").strip() or token for token in self.attention.tokens]
        return plot_attention(self.attention.weights[layer, head], words, title)

    def picture_of_all(self) -> Plot:
        """Return every head at a glance as a figure."""
        return plot_all_heads(
            self.attention.weights, self.attention.entropy_bits, "Where every head looks"
        )

    def close(self) -> None:
        """Take the widget away."""
        if self._task is not None:
            self._task.cancel()
        super().close()

    def __repr__(self) -> str:
        """Say what it is: what readers of a stored page see, who have no kernel."""
        return f"attention explorer: {self.attention!r}"

    # ---- inside ---------------------------------------------------------------------------------

    async def _read(self, sentence: str) -> None:
        try:
            # In a thread: a long sentence takes a large model seconds, and nobody should wait.
            self.attention = await asyncio.to_thread(
                read_attention, self._model, self._tokenizer, sentence
            )
            self._show()
        finally:
            self.read.disabled = False

    def _show(self) -> None:
        self.view.show(self.attention, self.layer.value, self.head.value)
        self._say_how_wide()

    def _say_how_wide(self) -> None:
        layer, head = self.layer.value, self.head.value
        bits = self.attention.entropy_bits[layer, head].item()
        self.message.say(
            f"layer {layer + 1}, head {head + 1}: entropy {bits:.3f} bits on average, as wide as "
            f"{2**bits:.1f} tokens looked at alike; {len(self.attention.tokens)} tokens"
        )

    def _chooser(self, name: str, count: int) -> widgets.Dropdown:
        made = labelled(
            widgets.Dropdown, name, options=[(str(one + 1), one) for one in range(count)],
            layout={"width": "9em"},
        )  # fmt: skip
        made.observe(
            self.message.guarded(lambda _: self.choose(self.layer.value, self.head.value)), "value"
        )
        return made
