"""A widget that shows the attention weights of every head for a sentence.

model, tokenizer, config = load_model_for_generation("runs/my_run")
explorer = AttentionExplorer(model, tokenizer, "Tom lost his red kite.")
explorer                               # in a notebook: the widget
explorer.plot()                        # the selected head as a figure, for pages without a kernel
explorer.attention.weights[0, 1]       # layer 1, head 2: (T, T), a row for each query
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from torch import Tensor
from torch.nn import functional as F

from horovod_lm.data.tokenizers import check_text
from horovod_lm.jupyter.plots import Plot, plot_all_heads, plot_attention
from horovod_lm.jupyter.widgets.visible import visible_token
from horovod_lm.jupyter.widgets.widget_parts import Message, frontend, labelled, row
from horovod_lm.utils.errors import DataError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM

THUMBNAIL_SIZE = 32  # rows and columns, at most


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of all heads for one text.

    Attributes:
        tokens: the T tokens as `visible` text, end-of-text first, as in training.
        weights: (L, H, T, T) for L layers of H heads; each row sums to 1.
    """

    tokens: list[str]
    weights: Tensor

    @property
    def entropy_bits(self) -> Tensor:
        """(L, H): mean entropy of a head's rows in bits; 0: each row is on one token only."""
        return row_entropy_bits(self.weights).mean(dim=-1)

    def __repr__(self) -> str:
        n_layers, n_heads = self.weights.shape[:2]
        layers = f"{n_layers} layer{'s' if n_layers > 1 else ''}"
        return f"attention of {layers} with {n_heads} heads over {len(self.tokens)} tokens"


def read_attention(model: TransformerLM, tokenizer: Tokenizer, text: str) -> AttentionMap:
    """Run a model on the beginning of a document and return its attention weights.

    Args:
        model: any model of this package; its mode, training or not, is restored.
        tokenizer: its tokenizer.
        text: at most the model's context, less one token for end-of-text. Empty: that token alone.

    Raises:
        DataError: the text is longer than the model's context, or cannot be encoded.
    """
    check_text(text, "the text")
    ids = [tokenizer.eot_id, *tokenizer.encode(text)]
    if len(ids) > model.max_seq_len:
        raise DataError(
            f"the text has {len(ids)} tokens with end-of-text before it, but the model's context "
            f"is {model.max_seq_len} tokens: shorten it"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        weights = model.attention_weights(torch.tensor([ids], device=device))[:, 0]
    finally:
        model.train(was_training)
    return AttentionMap([visible_token(tokenizer, one) for one in ids], weights.float().cpu())


def row_entropy_bits(weights: Tensor) -> Tensor:
    """Return the entropy of each row of (..., S) weights in bits: (...)."""
    return torch.special.entr(weights).sum(dim=-1) / math.log(2)


def thumbnails(weights: Tensor) -> Tensor:
    """Shrink every head's map; a cell keeps the largest of the weights that it stands for.

    Args:
        weights: (L, H, T, T).

    Returns:
        uint8 (L, H, n, n), n = min(T, THUMBNAIL_SIZE); 255 is a weight of 1.
    """
    size = min(weights.shape[-1], THUMBNAIL_SIZE)
    shrunk = F.adaptive_max_pool2d(weights, size)  # (L, H, T, T) -> (L, H, n, n)
    return (shrunk * 255).round().to(torch.uint8)


class AttentionView(anywidget.AnyWidget):
    """One head's weights as a heat map and as lines, and thumbnails of all heads.

    Args:
        on_head: called with (layer, head), both from 0, when a head is selected in the browser.
    """

    _esm = frontend("attention.js")
    _css = frontend("attention.css")
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    grid = traitlets.List([0, 0, 0], help="layers, heads, thumbnail size").tag(sync=True)
    entropy_bits: traitlets.List[Any] = traitlets.List(help="a list for each layer").tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    weights = traitlets.Bytes(b"", help="the head's (T, T), float32").tag(sync=True)
    thumbnails = traitlets.Bytes(b"", help="(L, H, n, n), a byte each").tag(sync=True)

    def __init__(self, on_head: Callable[[int, int], None]) -> None:
        super().__init__()
        self._on_head = on_head
        self.on_msg(self._receive)

    def show(self, attention: AttentionMap, layer: int, head: int) -> None:
        """Show a map, with one head selected."""
        small = thumbnails(attention.weights)
        bits = attention.entropy_bits.tolist()
        with self.hold_sync():
            self.tokens = attention.tokens
            self.grid = list(small.shape[:3])
            self.entropy_bits = [[round(one, 4) for one in layer_bits] for layer_bits in bits]
            self.thumbnails = small.numpy().tobytes()
            self.show_head(attention, layer, head)

    def show_head(self, attention: AttentionMap, layer: int, head: int) -> None:
        """Select another head of the same map."""
        with self.hold_sync():
            self.layer, self.head = layer, head
            self.weights = attention.weights[layer, head].contiguous().numpy().tobytes()

    def _receive(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if content.get("kind") == "head":
            self._on_head(int(content["layer"]), int(content["head"]))


class AttentionExplorer(widgets.VBox):
    """A sentence, and the attention weights of every head for it.

    Args:
        model: any model of this package.
        tokenizer: its tokenizer.
        sentence: the first sentence; at most the model's context.

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
        self.sentence = labelled(widgets.Textarea, "Sentence", value=sentence, rows=2, width="auto")
        self.read = self.message.button(
            "Show", "eye", "read the sentence and show its attention weights", self.start
        )
        self.attention = read_attention(model, tokenizer, sentence)
        n_layers, n_heads = self.attention.weights.shape[:2]
        self.layer, self.head = self._chooser("Layer", n_layers), self._chooser("Head", n_heads)
        self.view = AttentionView(on_head=self.message.guarded(self.choose))
        controls = row(self.read, self.layer, self.head)
        super().__init__([self.sentence, controls, self.message, self.view])
        self._show()

    def start(self) -> None:
        """Read the sentence of the input."""
        if self._task is None or self._task.done():
            self.read.disabled = True
            self.message.say("reading")
            self._task = self.message.start(self._read, self.sentence.value)

    def choose(self, layer: int, head: int) -> None:
        """Select a head; both numbers count from 0."""
        if (self.layer.value, self.head.value) != (layer, head):
            self.layer.value, self.head.value = layer, head
        self.view.show_head(self.attention, layer, head)
        self._describe_head()

    def plot(self) -> Plot:
        """Return the selected head as a figure."""
        layer, head = self.layer.value, self.head.value
        words = [token.replace("\n", "").strip() or token for token in self.attention.tokens]
        weights = self.attention.weights[layer, head]
        return plot_attention(weights, words, f"Layer {layer + 1}, head {head + 1}")

    def plot_all(self) -> Plot:
        """Return small maps of all heads as a figure."""
        entropy = self.attention.entropy_bits
        return plot_all_heads(self.attention.weights, entropy, "Where every head looks")

    def close(self) -> None:
        """Remove the widget."""
        if self._task is not None:
            self._task.cancel()
        super().close()

    def __repr__(self) -> str:
        """Describe the widget for pages without a kernel."""
        return f"attention explorer: {self.attention!r}"

    async def _read(self, sentence: str) -> None:
        try:
            # In a thread: a long sentence takes a large model seconds.
            self.attention = await asyncio.to_thread(
                read_attention, self._model, self._tokenizer, sentence
            )
            self._show()
        finally:
            self.read.disabled = False

    def _show(self) -> None:
        self.view.show(self.attention, self.layer.value, self.head.value)
        self._describe_head()

    def _describe_head(self) -> None:
        layer, head = self.layer.value, self.head.value
        bits = self.attention.entropy_bits[layer, head].item()
        self.message.say(
            f"layer {layer + 1}, head {head + 1}: mean entropy {bits:.3f} bits, as for "
            f"{2**bits:.1f} tokens with equal weights; {len(self.attention.tokens)} tokens"
        )

    def _chooser(self, name: str, count: int) -> widgets.Dropdown:
        options = [(str(index + 1), index) for index in range(count)]
        made = labelled(widgets.Dropdown, name, options=options, width="9em")
        made.observe(
            self.message.guarded(lambda _: self.choose(self.layer.value, self.head.value)), "value"
        )
        return made
