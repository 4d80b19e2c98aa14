"""TransformerLM: a decoder-only transformer language model with GPT-2's architecture.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": token embeddings and
learned position embeddings; pre-norm layers of causal self-attention and a feed-forward network
with residual connections; a final layer norm; and an output projection that shares its weight with
the token embedding (Press and Wolf 2017, https://arxiv.org/abs/1608.05859). With the weights that
`horovod_lm.models.gpt2` loads, the model computes GPT-2's logits.

Shapes: B sequences, T positions, C = d_model, V = vocab_size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from horovod_lm.models.attention import KVCache, LayerCache, MultiHeadAttention, causal_mask
from horovod_lm.models.loss import IGNORE_INDEX, chunked_cross_entropy, cross_entropy, shift_labels
from horovod_lm.utils.config import config_from_dict
from horovod_lm.utils.errors import DataError

GPT2_INIT_STD, GPT2_D_MODEL = 0.02, 768  # GPT-2's initial standard deviation, at its width


class FeedForward(nn.Module):
    """Position-wise MLP: project to `d_ff`, apply GELU, project back to `d_model`."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff)
        self.down_proj = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """One pre-norm layer: x + attention(LN(x)), then x + feed_forward(LN(x))."""

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
        attended = self.attention(self.attention_norm(x), mask, cache)
        x = x + F.dropout(attended, self.dropout, self.training)
        transformed = self.feed_forward(self.feed_forward_norm(x))
        return x + F.dropout(transformed, self.dropout, self.training)


class TransformerLM(nn.Module):
    """A GPT-style language model: maps token ids to logits for the next token.

    Args:
        vocab_size: V, size of the vocabulary; 50257 for GPT-2's tokenizer.
        d_model: C, numbers per position.
        n_heads: attention heads per layer; must divide `d_model`.
        n_layers: number of layers.
        d_ff: width of the feed-forward network, usually 4 x `d_model`.
        max_seq_len: maximum sequence length (context), in tokens.
        dropout: dropout probability in training, at GPT-2's three places.
        pad_token_id: fills the rows that have ended in `generate`; None: the end-of-text token.
            In the input, only `attention_mask` marks padding.
        gradient_checkpointing: keep only the input of each layer in training and recompute the
            rest in the backward pass: less memory, about a third more time, the same numbers.

    Raises:
        ConfigError: the sizes are invalid.
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
        sizes = {
            "vocab_size": vocab_size, "d_model": d_model, "n_heads": n_heads, "n_layers": n_layers,
            "d_ff": d_ff, "max_seq_len": max_seq_len, "dropout": dropout, "pad_token_id": None,
        }  # fmt: skip
        config_from_dict({"model": sizes}, name="TransformerLM")  # raises ConfigError
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.pad_token_id = pad_token_id
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self._chunked_cross_entropy = chunked_cross_entropy

        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, d_ff, dropout) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialize weights from a normal distribution; GPT-2's deviation is scaled to the width.

        The output of a matrix grows with sqrt(C). With a deviation of 0.02, attention scores of a
        narrow model start near zero, and attention takes many more steps to learn.
        """
        std = GPT2_INIT_STD * math.sqrt(GPT2_D_MODEL / self.token_embedding.embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # Each layer adds two terms to the residual stream: smaller terms keep the sum's scale.
        residual_std = std / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out_proj.weight", "feed_forward.down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)

    def num_parameters(self) -> int:
        """Return the number of parameters; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer and the chunked loss with `torch.compile`, in place.

        The layers share one compiled function, so that a deep model starts as soon as a shallow
        one, and each delivers its gradients before the backward pass of the next begins.
        """
        for block in self.blocks:
            block.compile(backend=backend)
        self._chunked_cross_entropy = torch.compile(chunked_cross_entropy, backend=backend)

    def flops_per_token(self) -> int:
        """Return the operations of a training step for each token, without recomputation.

        Forward and backward passes multiply and add three times for each element of a matrix, and
        12 C for each pair of positions in a layer: 6 N + 12 L C T, as the PaLM paper counts
        (https://arxiv.org/abs/2204.02311, appendix B).
        """
        matrices = sum(one.numel() for one in self.parameters() if one.dim() == 2)
        positions = self.position_embedding.weight.numel()  # added, not multiplied
        return 6 * (matrices - positions) + 12 * len(self.blocks) * positions

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the logits and, with `labels`, the loss.

        Args:
            input_ids: (B, T) token ids; B may be 0.
            attention_mask: (B, T), 1 for a token and 0 for padding, on either side; None: no
                padding. With a cache, (B, cached + T).
            labels: (B, T), usually `input_ids` itself: the model shifts them by one. Padding and
                -100 are ignored.
            cache: keys and values of earlier positions; the new ones are appended.
            return_logits: False, with labels, computes the loss in chunks and never holds the
                (B, T, V) logits: used in training.

        Returns:
            Logits (B, T, V), or None without `return_logits`; and the mean loss in nats over all
            labels that count (0.0 if none does), or None without `labels`.

        Raises:
            DataError: ids, shapes or lengths that do not fit this model.
        """
        self.check_inputs(input_ids, attention_mask, labels, cache.length if cache else 0)
        hidden = self.hidden_states(input_ids, attention_mask, cache)  # (B, T, C)
        logits = self.logits(hidden) if return_logits else None
        if labels is None:
            return logits, None
        targets = shift_labels(labels, attention_mask)
        if logits is not None:
            return logits, cross_entropy(logits, targets)
        return None, self._chunked_cross_entropy(hidden, self.token_embedding.weight, targets)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Run every layer and the final norm: (B, T) token ids -> (B, T, C)."""
        x, mask = self._embed(input_ids, attention_mask, cache.length if cache else 0)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            if recompute:
                # The block itself, not a lambda: a lambda would look up `block` in the backward
                # pass, when the loop variable is the last block.
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, mask, cache.layers[number] if cache else None)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output projection, tied to the token embedding: (..., C) -> (..., V)."""
        return F.linear(hidden, self.token_embedding.weight)

    def attention_weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the attention weights of every layer and head, without dropout.

        Arguments as for `forward`. The result is (n_layers, B, H, T, T): row t holds the weights of
        position t over positions 0 to t.
        """
        self.check_inputs(input_ids, attention_mask)
        layers = []
        with torch.no_grad():
            x, mask = self._embed(input_ids, attention_mask)
            for block in self.blocks:
                assert isinstance(block, TransformerBlock)
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
            max_new_tokens: maximum number of tokens to add.
            temperature: 0 is greedy; below 1 sharpens the distribution, above 1 flattens it.
            top_k: sample from the k most likely tokens; 0 or None: from all.
            top_p: sample from the smallest set of tokens with this probability; 1 or None: all.
            eos_token_id: a row ends when it samples this token; None: no row ends early.
            attention_mask: (B, T), zeros, then ones: shorter prompts are padded on the left.
            generator: random generator on the model's device.
            seed: replaces the generator: the same seed gives the same text. Without both, every
                call gives another text; torch's global generator is not used.
            use_cache: False recomputes all tokens for each new one: slow, the same text.

        Returns:
            (B, T + new): the prompts and their continuations. Ended rows are filled with
            `pad_token_id`; generation stops when all rows have ended. For text longer than
            `max_seq_len`, see `generate_tokens`.

        Raises:
            ConfigError: an invalid setting.
            DataError: an invalid prompt.
        """
        # Imported here, because `models` is below `generation`.
        import horovod_lm.generation.sampling as sampling

        steps = sampling.generate_tokens(
            self,
            input_ids,
            sampling.generation_config(max_new_tokens, temperature, top_k, top_p),
            eos_token_id,
            attention_mask,
            generator=generator or sampling.make_generator(seed, input_ids.device),
            use_cache=use_cache,
        )
        new_tokens = [tokens[:, None] for tokens in steps]  # each (B,) -> (B, 1)
        return torch.cat([input_ids, *new_tokens], dim=1)

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor | None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Embed (B, T) tokens after `start` cached positions; return (B, T, C) and the mask."""
        length = input_ids.shape[1]
        if start + length > self.max_seq_len:
            raise DataError(
                f"the sequence has {start + length} tokens, more than the model's max_seq_len = "
                f"{self.max_seq_len}: shorten it, or build the model with a larger max_seq_len"
            )
        if attention_mask is not None and attention_mask.device.type == "cpu":
            # Attention without a mask is faster. On a GPU, reading the result would wait.
            attention_mask = None if attention_mask.all() else attention_mask
        mask = None
        if attention_mask is None:
            positions = self.position_embedding.weight[start : start + length]  # (T, C)
        else:
            # The first token of a row has position 0, however much padding precedes it.
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
            positions = self.position_embedding(position_ids[:, start:])  # (B, T, C)
            mask = causal_mask(length, start + length, attention_mask)  # (B, 1, T, S)
        x = self.token_embedding(input_ids) + positions  # (B, T, C)
        return F.dropout(x, self.dropout, self.training), mask

    def check_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        n_cached: int = 0,
    ) -> None:
        """Raise DataError for shapes, types or token ids that do not fit; see `forward`.

        Token ids are checked on the CPU only: reading the result from a GPU would wait for it.
        """
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise DataError(
                "input_ids must be integers of shape (batch, length), got "
                f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            )
        n_sequences, length = input_ids.shape
        for name, tensor, columns in (
            ("attention_mask", attention_mask, n_cached + length),
            ("labels", labels, length),
        ):
            if tensor is not None and tensor.shape != (n_sequences, columns):
                raise DataError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {(n_sequences, columns)}"
                )
        for name, ids in (("input_ids", input_ids), ("labels", labels)):
            if ids is None or ids.device.type != "cpu":
                continue
            outside = (ids < 0) | (ids >= self.vocab_size)
            if name == "labels":
                outside &= ids != IGNORE_INDEX
            if outside.any():
                raise DataError(
                    f"{name} contains token {ids[outside][0]}, outside this model's vocabulary "
                    f"(0 to {self.vocab_size - 1}): was the text encoded with another tokenizer?"
                )
