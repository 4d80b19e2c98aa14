"""GPT-2's real weights in our model: the proof that it is the same model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.errors import CheckpointError

OUR_NAMES = {
    "wte.weight": "token_embedding.weight",
    "wpe.weight": "position_embedding.weight",
    "ln_f": "final_norm",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.output",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.widen",
    "mlp.c_proj": "feed_forward.narrow",
}
"""What GPT-2's authors called each part, and what we call it."""

_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, kept as weights by older versions


def gpt2_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and turn GPT-2's weights into ours.

    Args:
        state: the state dict of `transformers`' GPT2LMHeadModel or GPT2Model.

    Returns:
        A state dict for `TransformerLM.load_state_dict`.

    Raises:
        CheckpointError: an entry that GPT-2 does not have.
    """
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith(_BUFFERS):
            continue  # the output is tied to wte; masks are no weights
        layer = re.match(r"h\.(\d+)\.", name)
        part = name[layer.end() :] if layer else name
        theirs = next((key for key in OUR_NAMES if part == key or part.startswith(key + ".")), None)
        if theirs is None:
            raise CheckpointError(f"{name} is no part of GPT-2: these weights are of another model")
        prefix = f"blocks.{layer[1]}." if layer else ""
        # GPT-2 stores x @ W, (inputs, outputs); nn.Linear stores x @ W.T, (outputs, inputs).
        is_projection = ".c_" in part and tensor.ndim == 2
        ours[prefix + OUR_NAMES[theirs] + part[len(theirs) :]] = (
            tensor.t() if is_projection else tensor
        )
    return ours


def from_gpt2(gpt2: Any) -> TransformerLM:
    """Build the `TransformerLM` that equals a `transformers` GPT2LMHeadModel.

    Args:
        gpt2: the model; its config gives the sizes.

    Returns:
        A model with its own copy of the weights, in evaluation mode.

    Raises:
        CheckpointError: a variant of GPT-2 with other arithmetic.
    """
    config = gpt2.config
    if config.activation_function != "gelu_new" or config.scale_attn_by_inverse_layer_idx:
        raise CheckpointError(
            "only GPT-2's own arithmetic is supported: activation_function 'gelu_new' and "
            "scale_attn_by_inverse_layer_idx false"
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
    model.load_state_dict(gpt2_state_dict(gpt2.state_dict()))
    return model.eval()


def load_gpt2(name: str = "gpt2") -> TransformerLM:
    """Load GPT-2 by name (`gpt2`, `gpt2-medium` …) or from a folder with its files.

    Raises:
        CheckpointError: `transformers` is not installed, or the weights cannot be had.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise CheckpointError(
            "GPT-2's weights are read with the transformers library: pip install transformers"
        ) from None
    try:
        return from_gpt2(GPT2LMHeadModel.from_pretrained(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"GPT-2's weights {name!r} cannot be had ({reason}): go online once, or name "
            "a folder that holds config.json and model.safetensors"
        ) from None
