"""Load GPT-2's weights from `transformers` into `TransformerLM`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.errors import CheckpointError

_OUR_NAMES = {  # of modules
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ln_f": "final_norm",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv_proj",
    "attn.c_proj": "attention.out_proj",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.up_proj",
    "mlp.c_proj": "feed_forward.down_proj",
}

# Settings of `GPT2Config` that change the result, and the values that `TransformerLM` supports.
_SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, saved by older versions


def gpt2_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of `transformers`' GPT2LMHeadModel or GPT2Model to TransformerLM's.

    Names differ, and some matrices are transposed.

    Raises:
        CheckpointError: a parameter that GPT-2 does not have, or an output that is not tied to the
            embedding.
    """
    ours = {}
    output, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise CheckpointError(
            "lm_head.weight differs from transformer.wte.weight; TransformerLM has one weight for"
            " both"
        )
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith(_BUFFERS):
            continue  # the same as wte; masks are not parameters
        match = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match is None or match[2] not in _OUR_NAMES:
            raise CheckpointError(
                f"{name} is not a parameter of GPT-2: use a GPT-2 model's weights"
            )
        layer, module, kind = match.groups()
        prefix = f"blocks.{layer}." if layer else ""
        # GPT-2's Conv1D stores (inputs, outputs); nn.Linear stores (outputs, inputs).
        is_projection = ".c_" in module and tensor.ndim == 2
        ours[f"{prefix}{_OUR_NAMES[module]}.{kind}"] = tensor.t() if is_projection else tensor
    return ours


def from_gpt2(gpt2: Any) -> TransformerLM:
    """Build a `TransformerLM` that computes what a `transformers` GPT2LMHeadModel computes.

    The model has its own copy of the weights and is in evaluation mode.

    Raises:
        CheckpointError: a setting of the config that `TransformerLM` does not support, or weights
            of another shape.
    """
    config = gpt2.config
    one_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop"), (config.resid_pdrop,))
    for name, values in {**_SUPPORTED, **one_dropout}.items():
        value = getattr(config, name, values[0])
        if value not in values:
            raise CheckpointError(
                f"this GPT-2 has {name}={value!r}; TransformerLM supports only "
                f"{' or '.join(map(repr, values))}"
            )
    model = TransformerLM(
        vocab_size=config.vocab_size,
        d_model=config.n_embd,
        n_heads=config.n_head,
        n_layers=config.n_layer,
        d_ff=config.n_inner or 4 * config.n_embd,
        max_seq_len=config.n_positions,
        dropout=config.resid_pdrop,
        pad_token_id=config.eos_token_id,
    )
    try:
        model.load_state_dict(gpt2_state_dict(gpt2.state_dict()))
    except RuntimeError as error:  # for example, heads have been removed
        reason = " ".join(str(error).split())
        raise CheckpointError(f"this GPT-2's weights do not fit its config: {reason}") from None
    return model.eval()


def load_gpt2(name: str = "gpt2") -> TransformerLM:
    """Load GPT-2 by name (`gpt2`, `gpt2-medium` …) or from a folder.

    Raises:
        CheckpointError: `transformers` is not installed, or the weights cannot be loaded.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise CheckpointError(
            "loading GPT-2's weights needs the transformers library: pip install transformers"
        ) from None
    try:
        return from_gpt2(GPT2LMHeadModel.from_pretrained(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"GPT-2's weights {name!r} cannot be loaded ({reason}): connect to the network, or "
            "give a folder with config.json and model.safetensors"
        ) from None
