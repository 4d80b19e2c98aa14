"""A widget that shows the attention weights of every head for a sentence.

model, tokenizer, config = load_model_for_generation("runs/my_run")
explorer = AttentionExplorer(model, tokenizer, "Tom lost his red kite.")
explorer                               # in a notebook: the widget
explorer.plot_all()                    # all heads as a figure, for pages without a kernel
explorer.attention.weights[0, 1]       # layer 1, head 2: (T, T), a row for each query
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from torch import Tensor
from torch.nn import functional as F

from horovod_lm.data.tokenizers import check_text
from horovod_lm.jupyter.plots import Plot, plot_all_heads
from horovod_lm.jupyter.widgets.widget_parts import (
    BaseWidget,
    frontend,
    labelled,
    visible_token,
)
from horovod_lm.utils.errors import DataError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.models.transformer_lm import TransformerLM

THUMBNAIL_SIZE = 32  # rows and columns, at most


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of all heads for one text."""

    tokens: list[str]  # the T tokens as `visible` text, end-of-text first, as in training
    weights: Tensor  # (L, H, T, T) for L layers of H heads; each row sums to 1

    @property
    def entropy_bits(self) -> Tensor:
        """(L, H): mean entropy of a head's rows in bits; 0: each row is on one token only."""
        return torch.special.entr(self.weights).sum(dim=-1).mean(dim=-1) / math.log(2)

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


def thumbnails(weights: Tensor) -> Tensor:
    """Shrink (L, H, T, T) weights to uint8 (L, H, n, n), n at most `THUMBNAIL_SIZE`.

    A cell keeps the largest of the weights that it stands for; 255 is a weight of 1.
    """
    size = min(weights.shape[-1], THUMBNAIL_SIZE)
    shrunk = F.adaptive_max_pool2d(weights, size)  # (L, H, T, T) -> (L, H, n, n)
    return (shrunk * 255).round().to(torch.uint8)


class AttentionView(anywidget.AnyWidget):
    """One head as a heat map and as lines, and all heads; a click on one sends [layer, head]."""

    _esm = frontend("attention.js")
    _css = frontend("attention.css")
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    grid = traitlets.List([0, 0, 0], help="layers, heads, thumbnail size").tag(sync=True)
    entropy_bits: traitlets.List[Any] = traitlets.List(help="a list for each layer").tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    weights = traitlets.Bytes(b"", help="the head's (T, T), float32").tag(sync=True)
    thumbnails = traitlets.Bytes(b"", help="(L, H, n, n), a byte each").tag(sync=True)

    def show(self, attention: AttentionMap, layer: int, head: int) -> None:
        """Show a map, with one head selected."""
        small = thumbnails(attention.weights)
        with self.hold_sync():
            self.tokens = attention.tokens
            self.grid = list(small.shape[:3])
            self.entropy_bits = attention.entropy_bits.tolist()
            self.thumbnails = small.numpy().tobytes()
            self.show_head(attention, layer, head)

    def show_head(self, attention: AttentionMap, layer: int, head: int) -> None:
        """Select another head of the same map."""
        weights = attention.weights[layer, head].contiguous().numpy().tobytes()
        with self.hold_sync():
            self.layer, self.head, self.weights = layer, head, weights


class AttentionExplorer(BaseWidget):
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
        self.attention = read_attention(model, tokenizer, sentence)
        super().__init__()
        self.sentence = labelled(widgets.Textarea, "Sentence", "auto", value=sentence, rows=2)
        self.read = self.button(
            "Show", "eye", "read the sentence and show its attention weights", self.start
        )
        self.view = AttentionView()
        self.view.on_msg(self.guarded(lambda _, place, buffers: self.choose(*place)))
        self.children = [self.sentence, self.read, self.message, self.view]
        self._show()

    def start(self) -> None:
        """Read the sentence of the input."""
        if not self.is_busy:
            self.read.disabled = True
            self.say("reading")
            self.start_task(self._read, self.sentence.value)

    def choose(self, layer: int, head: int) -> None:
        """Select a head; both numbers count from 0."""
        self.view.show_head(self.attention, layer, head)
        self._describe_head()

    def plot_all(self) -> Plot:
        """Return small maps of all heads as a figure."""
        entropy = self.attention.entropy_bits
        return plot_all_heads(self.attention.weights, entropy, "Where every head looks")

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
        self.view.show(self.attention, self.view.layer, self.view.head)
        self._describe_head()

    def _describe_head(self) -> None:
        layer, head = self.view.layer, self.view.head
        bits = self.attention.entropy_bits[layer, head].item()
        self.say(
            f"layer {layer + 1}, head {head + 1}: mean entropy {bits:.3f} bits, as for "
            f"{2**bits:.1f} tokens with equal weights; {len(self.attention.tokens)} tokens"
        )
