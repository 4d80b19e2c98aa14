"""TransformerLM: a decoder-only transformer language model with GPT-2's architecture.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": token and learned
position embeddings; layers of causal self-attention and a feed-forward network, each behind a layer
norm and added to what came in (pre-norm); a last layer norm; and the token embedding once more, as
the output (weight tying, Press and Wolf 2017, https://arxiv.org/abs/1608.05859). So GPT-2's real
weights fit (`horovod_lm.models.gpt2`) and give GPT-2's numbers.

Shapes: B sequences, T positions, C = d_model, V = vocab_size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from horovod_lm.models.attention import (
    KeyValueCache,
    LayerCache,
    MultiHeadAttention,
    allowed_positions,
)
from horovod_lm.models.checks import check_inputs, check_sizes
from horovod_lm.models.loss import cross_entropy, cross_entropy_in_pieces, shift_labels
from horovod_lm.models.sampling import SamplingSettings, decode, make_generator

GPT2_DEVIATION, GPT2_WIDTH = 0.02, 768  # of every weight at the start, at GPT-2's d_model


class FeedForward(nn.Module):
    """Each position on its own: widen to `d_ff` numbers, bend by GELU, narrow to `d_model`."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.widen = nn.Linear(d_model, d_ff)
        self.narrow = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.narrow(F.gelu(self.widen(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """One layer: positions look at each other, then each thinks for itself; both are added on."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = dropout

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C); `mask` and `cache` as for `MultiHeadAttention`."""
        x = x + self._drop(self.attention(self.attention_norm(x), mask, cache))
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class TransformerLM(nn.Module):
    """A GPT-style language model: reads token ids, says how likely each token is to come next.

    Args:
        vocab_size: V, number of tokens it knows; 50257 is GPT-2's tokenizer.
        d_model: C, numbers per position.
        n_heads: attention heads per layer; must divide `d_model`.
        n_layers: layers.
        d_ff: width of the feed-forward network, usually 4 x `d_model`.
        max_seq_len: the longest sequence it can see at once, in tokens.
        dropout: probability of dropping a number, in training, at GPT-2's three places.
        pad_token_id: what `generate` fills ended rows with; None: the end-of-text token. What is
            padding in the input is said by `attention_mask` alone, because GPT-2 pads with its
            end-of-text token, which is a real token elsewhere.
        gradient_checkpointing: keep only the input of each layer in training and compute the rest
            again in the backward pass: less memory, about a third more time, the same numbers.

    Raises:
        ConfigError: the sizes cannot work together.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        d_model: int = 768,
        n_heads: int = 12,
        n_layers: int = 12,
        d_ff: int = 3072,
        max_seq_len: int = 512,
        dropout: float = 0.1,
        pad_token_id: int | None = 50256,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size, d_model, n_heads, n_layers, d_ff, max_seq_len, dropout)
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.pad_token_id = pad_token_id
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing

        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, d_ff, dropout) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model)
        self._initialise()

    def _initialise(self) -> None:
        """Draw normal weights, as spread as GPT-2's at its width; what is added on, smaller.

        A product with C weights grows with sqrt(C): the same 0.02 in a narrow model would leave
        every score near zero, and attention takes many times longer to find what to look for.
        """
        deviation = GPT2_DEVIATION * math.sqrt(GPT2_WIDTH / self.token_embedding.embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # Each layer adds two terms to the residual stream: smaller terms keep their sum's size.
        residual_deviation = deviation / math.sqrt(2 * len(self.blocks))
        for block in self.blocks:
            nn.init.normal_(block.attention.output.weight, std=residual_deviation)
            nn.init.normal_(block.feed_forward.narrow.weight, std=residual_deviation)

    def num_parameters(self) -> int:
        """Count the trained numbers; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict every next token, and compare with `labels` where they are given.

        Args:
            input_ids: (B, T) token ids; B may be 0.
            attention_mask: (B, T), 1 for a token and 0 for padding, on either side; None: no
                padding. With a cache, (B, cached + T).
            labels: (B, T), usually `input_ids` itself: the shift by one happens in here. Padding
                and -100 are left out.
            cache: keys and values of the positions before these; it takes up the new ones.
            return_logits: False, with labels, computes the loss in pieces and never holds the
                (B, T, V) matrix: what training does.

        Returns:
            Logits (B, T, V), or None without `return_logits`; and the mean loss over all labels
            that count, in nats (0.0 if none does), or None without `labels`.

        Raises:
            DataError: ids, shapes or lengths that do not fit this model.
        """
        check_inputs(
            input_ids, attention_mask, labels, vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len, n_cached=cache.length if cache else 0,
        )  # fmt: skip
        hidden = self.hidden_states(input_ids, attention_mask, cache)  # (B, T, C)
        logits = self.logits(hidden) if return_logits else None
        if labels is None:
            return logits, None
        targets = shift_labels(labels, attention_mask)
        if logits is not None:
            return logits, cross_entropy(logits, targets)
        return None, cross_entropy_in_pieces(hidden, self.token_embedding.weight, targets)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Run every layer: (B, T) token ids -> (B, T, C), one vector per position, normalised."""
        x, mask = self._embed(input_ids, attention_mask, cache.length if cache else 0)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            if recompute:
                # The block itself, not a lambda around it: a lambda made in this loop would look up
                # `block` only in the backward pass, when the loop variable is the last block.
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, mask, cache.layers[number] if cache else None)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary: (..., C) -> (..., V), by the tied embedding."""
        return F.linear(hidden, self.token_embedding.weight)

    def attention_weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Show where every head of every layer looks.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: as for `forward`.

        Returns:
            (n_layers, B, H, T, T): each row is one position's weights over itself and its past,
            as they are without dropout; it sums to 1.
        """
        check_inputs(
            input_ids,
            attention_mask,
            None,
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
        )
        layers = []
        with torch.no_grad():
            x, mask = self._embed(input_ids, attention_mask)
            for block in self.blocks:
                layers.append(block.attention.weights(block.attention_norm(x), mask))
                x = block(x, mask)
        return torch.stack(layers)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = 0.9,
        eos_token_id: int | None = 50256,
        attention_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue every row, token by token.

        Args:
            input_ids: (B, T) token ids of the prompts, T >= 1.
            max_new_tokens: the most tokens to add.
            temperature: 0 takes the likeliest token (greedy); below 1 is bolder, above 1 wilder.
            top_k: draw among the k likeliest tokens only; 0 or None: among all.
            top_p: draw among the likeliest tokens that reach this probability together; 1 or None:
                all.
            eos_token_id: a row ends when it draws this token; None: no row ends early.
            attention_mask: (B, T), zeros, then ones: shorter prompts are padded on the left.
            generator: draws the random numbers; on the model's device.
            seed: instead of a generator: the same seed draws the same text. With neither, each call
                draws anew. Torch's global generator is never touched.
            use_cache: False computes everything again for each token: slow, the same text.

        Returns:
            (B, T + new): the prompts and what follows. Rows that ended are filled with
            `pad_token_id`; it stops early once all have ended. Text longer than `max_seq_len` is
            continued from its last part: see `horovod_lm.models.sampling.decode`.

        Raises:
            DataError: a prompt or a setting that cannot work.
        """
        settings = SamplingSettings(temperature, top_k, top_p)
        generator = generator or make_generator(seed, input_ids.device)
        steps = decode(
            self, input_ids, max_new_tokens, settings, eos_token_id, attention_mask,
            generator=generator, use_cache=use_cache,
        )  # fmt: skip
        new_tokens = [tokens[:, None] for tokens in steps]  # each (B,) -> (B, 1)
        return torch.cat([input_ids, *new_tokens], dim=1)

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor | None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Embed tokens that follow `start` cached positions: (B, T, C), and who may look where."""
        length = input_ids.shape[1]
        if (
            attention_mask is not None
            and attention_mask.device.type == "cpu"
            and attention_mask.all()
        ):
            attention_mask = (
                None  # nothing is padded: the quick way. On a GPU, asking would wait for it
            )
        mask = None
        if attention_mask is None:
            positions = self.position_embedding.weight[start : start + length]  # (T, C)
        else:
            # The first token of a row is at position 0, however much padding stands before it.
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
            positions = self.position_embedding(position_ids[:, start:])  # (B, T, C)
            mask = allowed_positions(length, start + length, attention_mask)  # (B, 1, T, S)
        x = self.token_embedding(input_ids) + positions  # (B, T, C)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x, mask
