"""Load a model for generation: weights, tokenizer, configuration and device."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import BEST, FINAL, find_checkpoints, read_checkpoint, restore
from horovod_lm.utils.config import Config, config_from_dict, load_config
from horovod_lm.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer


def load_model_for_generation(
    checkpoint_path: str | Path,
    config_path: str | Path | None = None,
    device: torch.device | str | None = None,
) -> tuple[TransformerLM, Tokenizer, Config]:
    """Load a model, its tokenizer and its configuration from a checkpoint.

    Args:
        checkpoint_path: a checkpoint, or a run's folder: its best model, else its newest one.
        config_path: a YAML file that replaces the checkpoint's configuration, except the model's
            sizes, which the weights determine.
        device: "cpu", "cuda" …; None: a GPU if there is one. If a requested GPU does not exist,
            the CPU is used, with a message.

    Returns:
        The model on its device, in evaluation mode; the tokenizer; the configuration.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or incomplete.
        ConfigError: the YAML file or the device is invalid.
    """
    path = find_checkpoint(checkpoint_path)
    checkpoint = read_checkpoint(path)
    config = _config_for(checkpoint, path, config_path)
    model = TransformerLM(**config.model.model_dump())
    restore(checkpoint, model=model, name=str(path))
    to_column_major(model)
    tokenizer = _tokenizer_for(checkpoint, path, config)
    return model.to(choose_device(device)).eval(), tokenizer, config


def to_column_major(model: TransformerLM) -> TransformerLM:
    """Store each weight with at least as many outputs as inputs by column; values do not change.

    With a cache, generation multiplies every weight (outputs, inputs) by one vector per sequence.
    On a CPU that takes as long as reading the weight. The libraries read these by column 1.2 to
    2.5 times as fast as by row; weights with more inputs than outputs they read as fast or faster
    by row. Only for generation: in training, gradients and optimizer states would take over the
    layout of their parameter.

    Args:
        model: changed in place.

    Returns:
        The same model.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for weight in (model.token_embedding.weight, *weights):
        n_outputs, n_inputs = weight.shape
        if n_outputs >= n_inputs:
            weight.data = weight.data.t().contiguous().t()
    return model


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a file; in a run's folder, the best checkpoint, else the newest."""
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


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """Turn a device's name into a device that is there; None: a GPU where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"{device!r} is no device: use cpu, cuda or cuda:1") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        _say_once(f"There is no {wanted} here: the model runs on the CPU.")
        return torch.device("cpu")
    return wanted


def _config_for(checkpoint: dict[str, Any], path: Path, config_path: str | Path | None) -> Config:
    """Merge the checkpoint's configuration with the user's; the weights determine the sizes."""
    own = checkpoint.get("config")
    trained = config_from_dict(own, name=f"the configuration in {path}") if own else None
    config = trained if config_path is None else load_config(config_path)
    if config is None:
        raise CheckpointError(f"{path} contains no configuration: give the one of its training")
    embedding = checkpoint["model"].get("token_embedding.weight")
    if embedding is None:
        raise CheckpointError(f"{path} contains the weights of another kind of model")
    # The trained tokenizer may have fewer tokens than the configuration allows.
    model = (trained or config).model.model_copy(update={"vocab_size": len(embedding)})
    return config.model_copy(update={"model": model})


def _tokenizer_for(checkpoint: dict[str, Any], path: Path, config: Config) -> Tokenizer:
    """Restore the tokenizer in the checkpoint, or else the one in the data folder."""
    from horovod_lm.data.tokenizers import load_tokenizer

    if checkpoint.get("tokenizer"):
        return load_tokenizer(checkpoint["tokenizer"])
    beside_data = config.resolve(config.data.data_dir) / "tokenizer.json"
    if not beside_data.is_file():
        raise CheckpointError(f"{path} contains no tokenizer, and {beside_data} does not exist")
    return load_tokenizer(beside_data)


@cache
def _say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)
