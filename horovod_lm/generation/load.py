"""Load a model for generation: weights, tokenizer, configuration and device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from horovod_lm.data.tokenizers import Tokenizer, load_tokenizer
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import BEST, FINAL, find_checkpoints, read_checkpoint, restore
from horovod_lm.utils.config import Config, config_from_dict, load_config
from horovod_lm.utils.distributed import choose_device
from horovod_lm.utils.errors import CheckpointError, ConfigError

DTYPES = ("float32", "bfloat16")


def load_model_for_generation(
    checkpoint_path: str | Path,
    config_path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: str = "float32",
) -> tuple[TransformerLM, Tokenizer, Config]:
    """Load a model, its tokenizer and its configuration from a checkpoint.

    Args:
        checkpoint_path: a checkpoint, or a run's folder: its best checkpoint, else its newest.
        config_path: a YAML file that replaces the checkpoint's configuration, except the model's
            sizes, which the weights determine.
        device: as for `horovod_lm.utils.distributed.choose_device`; None: a GPU if there is one.
        dtype: type of the weights, "float32" or "bfloat16". bfloat16 takes half the memory,
            and rounds every weight to 8 significant bits, so that probabilities differ slightly and
            texts can. On a CPU with AVX512-BF16 it is faster only for large models: 1.3 times at 30
            million parameters, 0.7 times at 5 million.

    Returns:
        The model on its device, in evaluation mode; the tokenizer; the configuration.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or incomplete.
        ConfigError: the YAML file, the device or the type is invalid.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    path = find_checkpoint(checkpoint_path)
    checkpoint = read_checkpoint(path)
    config = _config_for(checkpoint, path, config_path)
    model = TransformerLM(**config.model.model_dump())
    restore(checkpoint, model=model, name=str(path))
    model.to(getattr(torch, dtype))
    if dtype == "float32":
        to_column_major(model)
    tokenizer = _tokenizer_for(checkpoint, path, config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's"
            f" {config.model.vocab_size}: it is of another run"
        )
    return model.to(choose_device(device)).eval(), tokenizer, config


def to_column_major(model: TransformerLM) -> TransformerLM:
    """Store the matrices in column-major order, in place; values do not change.

    With a cache, generation multiplies every weight (outputs, inputs) by one vector per sequence,
    which on a CPU takes as long as reading the weight. In column-major order float32 is read 1.2 to
    1.7 times as fast; bfloat16 is not. Not for training: gradients and optimizer states would have
    the same layout.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for weight in (model.token_embedding.weight, *weights):
        weight.data = weight.data.t().contiguous().t()
    return model


def find_checkpoint(path: str | Path) -> Path:
    """Return the best checkpoint of a run's folder, else its newest; a file's path as it is."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path  # `read_checkpoint` reports a missing file
    for folder in (path / "checkpoints", path):
        best = folder / BEST
        if found := [best] if best.is_file() else find_checkpoints(folder):
            return found[0]
    raise CheckpointError(
        f"neither {path} nor its folder checkpoints/ contains a checkpoint ({BEST}, {FINAL} or "
        "checkpoint_epoch*_step*.pt)"
    )


def _config_for(checkpoint: dict[str, Any], path: Path, config_path: str | Path | None) -> Config:
    """Merge the checkpoint's configuration with the user's; the weights determine the sizes."""
    own = checkpoint.get("config")
    trained = config_from_dict(own, name=f"the configuration in {path}") if own else None
    config = trained if config_path is None else load_config(config_path)
    if config is None:
        raise CheckpointError(f"{path} contains no configuration: give the one of its training")
    # The trained tokenizer may have fewer tokens than the configuration allows.
    model = (trained or config).model.model_copy(update=_sizes(checkpoint["model"], path))
    return config.model_copy(update={"model": model})


def _sizes(state: dict[str, torch.Tensor], path: Path) -> dict[str, int]:
    """Return the sizes of a model, from the shapes of its weights."""
    try:
        vocab_size, d_model = state["token_embedding.weight"].shape
        return {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "max_seq_len": len(state["position_embedding.weight"]),
            "n_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "d_ff": len(state["blocks.0.feed_forward.up_proj.bias"]),
        }
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(f"{path} contains the weights of another kind of model") from None


def _tokenizer_for(checkpoint: dict[str, Any], path: Path, config: Config) -> Tokenizer:
    """Restore the tokenizer in the checkpoint, or else the one in the data folder."""
    if checkpoint.get("tokenizer"):
        return load_tokenizer(checkpoint["tokenizer"])
    beside_data = config.resolve(config.data.data_dir) / "tokenizer.json"
    if not beside_data.is_file():
        raise CheckpointError(f"{path} contains no tokenizer, and {beside_data} does not exist")
    return load_tokenizer(beside_data)
