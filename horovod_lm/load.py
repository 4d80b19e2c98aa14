"""From a checkpoint to a model that can talk: weights, tokenizer, settings and device."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horovod_lm.checkpoint import BEST, FINAL, find_checkpoints, read_checkpoint, restore
from horovod_lm.models.layout import store_by_column
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import Config, config_from_dict, load_config
from horovod_lm.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer


def load_model_for_generation(
    checkpoint_path: str | Path,
    config_path: str | Path | None = None,
    device: torch.device | str | None = None,
) -> tuple[TransformerLM, Tokenizer, Config]:
    """Load a model, its tokenizer and its settings from a checkpoint.

    Args:
        checkpoint_path: a checkpoint, or a run's folder: its best model, else its newest.
        config_path: a YAML file whose settings replace the checkpoint's own. The model's shape is
            always the checkpoint's, since no other fits its weights.
        device: "cpu", "cuda" …; None: a GPU where there is one. A GPU that is asked for and not
            there is replaced by the CPU, said once.

    Returns:
        The model on its device, in evaluation mode; the tokenizer; the configuration.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or incomplete.
        ConfigError: the YAML file or the device is not valid.
    """
    path = find_checkpoint(checkpoint_path)
    checkpoint = read_checkpoint(path)
    config = _config_for(checkpoint, path, config_path)
    model = TransformerLM(**config.model.model_dump())
    restore(checkpoint, model=model, name=str(path))
    store_by_column(model)
    tokenizer = _tokenizer_for(checkpoint, path, config)
    return model.to(choose_device(device)).eval(), tokenizer, config


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a file; in a run's folder, its best checkpoint, else its furthest."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path  # a file, or nothing: reading it will say so
    for folder in (path / "checkpoints", path):
        best = folder / BEST
        if found := [best] if best.is_file() else find_checkpoints(folder):
            return found[0]
    raise CheckpointError(
        f"the folder {path} holds no checkpoint ({BEST}, {FINAL} or checkpoint_epoch*_step*.pt), "
        "neither itself nor in checkpoints/"
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
    """Join the checkpoint's configuration with the user's: the model's shape is in the weights."""
    own = checkpoint.get("config")
    if own is None and config_path is None:
        raise CheckpointError(f"{path} holds no configuration: give the one it was trained with")
    config = config_from_dict(own, name=f"the configuration in {path}") if own else None
    if config_path is not None:
        given = load_config(config_path)
        config = given if config is None else given.model_copy(update={"model": config.model})
    embedding = checkpoint["model"].get("token_embedding.weight")
    if embedding is None:
        raise CheckpointError(f"{path} holds the weights of another kind of model")
    # A tokenizer may have learned fewer tokens than the configuration allowed.
    model = config.model.model_copy(update={"vocab_size": len(embedding)})
    return config.model_copy(update={"model": model})


def _tokenizer_for(checkpoint: dict[str, Any], path: Path, config: Config) -> Tokenizer:
    """Restore the tokenizer inside the checkpoint, or the one beside its data."""
    from horovod_lm.data.tokenizers import load_tokenizer

    if checkpoint.get("tokenizer"):
        return load_tokenizer(checkpoint["tokenizer"])
    beside_data = config.resolve(config.data.data_dir) / "tokenizer.json"
    if not beside_data.is_file():
        raise CheckpointError(f"{path} holds no tokenizer, and there is none at {beside_data}")
    return load_tokenizer(beside_data)


@cache
def _say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)
