"""Checkpoints: written whole or not at all, loaded without running a line of anybody's code.

A checkpoint holds everything that training needs to go on and everything that generation needs to
talk: model, optimizer, schedule, position in the data, configuration and tokenizer.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import CheckpointError

FORMAT = 1
BEST, FINAL = "best_model.pt", "final_model.pt"
_NUMBERED = re.compile(r"checkpoint_epoch(\d+)_step(\d+)\.pt")


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    epoch: int,
    step: int,
    loss: float,
    checkpoint_dir: str | Path,
    filename: str,
    scheduler: Any | None = None,
    scaler: Any | None = None,
    global_step: int = 0,
    *,
    best_loss: float | None = None,
    samples_seen: int = 0,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    **extra: Any,
) -> Path:
    """Write one checkpoint: to a temporary name, synced to disk, then renamed.

    A reader finds the whole file or none, whenever the writer dies. Of many ranks, rank 0 calls it.

    Args:
        model: its `state_dict()` is saved; a compiled model is saved under its uncompiled names.
        optimizer: or None, for a checkpoint that only generates.
        epoch: the epoch in progress, from 0.
        step: optimizer steps done in that epoch.
        loss: the last loss measured, in nats per token.
        checkpoint_dir: created if it is not there.
        filename: for example `checkpoint_epoch5.pt`.
        scheduler: a learning rate scheduler with a `state_dict()`.
        scaler: a gradient scaler with a `state_dict()`.
        global_step: optimizer steps done since the start of the run.
        best_loss: the best validation loss so far, which `loss` need not be.
        samples_seen: blocks of that epoch already trained on, by all ranks together.
        config: `Config.to_dict()`, so that the checkpoint alone is enough to rebuild the model.
        tokenizer: the tokenizer as JSON text, so that it alone is enough to talk.
        **extra: further plain values.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    content = checkpoint_content(
        model,
        optimizer,
        scheduler,
        scaler,
        config=config,
        tokenizer=tokenizer,
        epoch=int(epoch),
        step=int(step),
        global_step=int(global_step),
        loss=float(loss),
        best_loss=None if best_loss is None else float(best_loss),
        samples_seen=int(samples_seen),
        **extra,
    )
    return write_checkpoint(content, Path(checkpoint_dir) / filename)


def checkpoint_content(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    scaler: Any | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    **position: Any,
) -> dict[str, Any]:
    """Return what a checkpoint holds; its tensors are the model's own, not copies.

    Args:
        model: as for `save_checkpoint`, and so are the others.
        **position: how far the run has come, as plain values.
    """
    return {
        "format": FORMAT,
        "model": uncompiled(model).state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None if scheduler is None else _plain(scheduler.state_dict()),
        "scaler": None if scaler is None else _plain(scaler.state_dict()),
        "config": None if config is None else _plain(dict(config)),
        "tokenizer": tokenizer,
        **_plain(position),
    }


def write_checkpoint(content: Mapping[str, Any], path: Path) -> Path:
    """Write what `checkpoint_content` returned, whole or not at all. Return the path.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be written ({error}): check the folder and the disk"
        ) from error
    finally:
        with suppress(OSError):  # it is not there when all went well
            temporary.unlink()
    return path


def copy_to_memory(content: Any) -> Any:
    """Return a copy of a checkpoint's content, tensors on the CPU, that training cannot change."""
    return map_tensors(content, lambda tensor: tensor.detach().to("cpu", copy=True))


def map_tensors(content: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return nested plain values with `change` applied to each tensor, always in the same order."""
    if isinstance(content, torch.Tensor):
        return change(content)
    if isinstance(content, Mapping):
        return {key: map_tensors(value, change) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map_tensors(value, change) for value in content)
    return content


def load_checkpoint(
    checkpoint_path: str | Path,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    scaler: Any | None = None,
) -> dict[str, Any]:
    """Read a checkpoint and load what it holds into the objects that are given.

    Args:
        checkpoint_path: the file.
        model: gets the parameters, whatever device it is on.
        optimizer: gets its moments and steps. With Horovod, the wrapped one: wrapping drops state.
        scheduler: gets its position.
        scaler: gets its scale.

    Returns:
        The whole checkpoint, tensors on the CPU; `save_checkpoint` names its keys.

    Raises:
        CheckpointError: the file is missing, cut short, holds code, or is of another model.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    restore(checkpoint, model, optimizer, scheduler, scaler, name=str(checkpoint_path))
    return checkpoint


def read_checkpoint(checkpoint_path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU; never run code that a file may hold.

    Raises:
        CheckpointError: the file is missing, cut short, holds code, or is no checkpoint of ours.
    """
    path = Path(checkpoint_path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}{_others(path.parent)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's opinion of a stranger's pickle
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a file cut at any byte fails in a dozen ways
        if _is_refusal(error, path):
            raise CheckpointError(
                f"{path} is refused: it holds more than tensors and plain values, and loading it"
                " could run code; load only checkpoints that save_checkpoint wrote"
            ) from None
        raise CheckpointError(_damaged(path)) from None
    if not isinstance(checkpoint, dict) or not _is_state(checkpoint.get("model")):
        raise CheckpointError(f"{path} is not a checkpoint of this project: it holds no 'model'")
    if checkpoint.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {checkpoint.get('format')}, this version reads {FORMAT}:"
            " load it with the version of horovod_lm that wrote it"
        )
    return checkpoint


def restore(
    checkpoint: Mapping[str, Any],
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    scaler: Any | None = None,
    name: str | Path = "the checkpoint",
) -> None:
    """Load what a checkpoint holds into the objects that are given; see `load_checkpoint`."""
    if model is not None:
        _restore_model(uncompiled(model), checkpoint["model"], name)
    for part, target in (("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
        if target is None:
            continue
        if checkpoint.get(part) is None:
            raise CheckpointError(f"{name} holds no {part} state: it was saved for generation only")
        try:
            target.load_state_dict(checkpoint[part])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{name} holds the {part} of another setting: {reason}") from None


def find_checkpoints(checkpoint_dir: str | Path) -> list[Path]:
    """Return a run's numbered and final checkpoints, the furthest first."""
    paths = [
        path for path in Path(checkpoint_dir).glob("checkpoint_epoch*_step*.pt") if _step(path)
    ]
    final = Path(checkpoint_dir) / FINAL
    return ([final] if final.is_file() else []) + sorted(paths, key=_step, reverse=True)


def newest_readable(checkpoint_dir: str | Path) -> Path:
    """Return a run's furthest checkpoint that can be read, passing over one that was cut short.

    Raises:
        CheckpointError: there is none.
    """
    for path in find_checkpoints(checkpoint_dir):
        try:
            read_checkpoint(path)
            return path
        except CheckpointError as error:
            print(f"warning: {error}; an earlier one is taken", file=sys.stderr)
    raise CheckpointError(
        f"{checkpoint_dir} holds no checkpoint to go on from: start the run again"
    )


def check_same_model(checkpoint: Mapping[str, Any], config: Config, name: str | Path) -> None:
    """Refuse a checkpoint of another architecture, naming the setting that differs.

    Raises:
        CheckpointError: a setting of the model differs.
    """
    there, here = (checkpoint.get("config") or {}).get("model", {}), config.to_dict()["model"]
    for key in ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "max_seq_len"):
        if key in there and there[key] != here[key]:
            raise CheckpointError(
                f"{name} was trained with model.{key}={there[key]}, and the configuration says"
                f" {here[key]}: resume with the run's own config.yaml"
            )


def checkpoint_name(epoch: int, global_step: int) -> str:
    """Return the file name of a numbered checkpoint."""
    return f"checkpoint_epoch{epoch}_step{global_step}.pt"


def remove_old_checkpoints(checkpoint_dir: str | Path, keep: int) -> None:
    """Keep the `keep` furthest numbered checkpoints and delete the others; best and final stay.

    What a writer that was killed has left goes, too: the caller is the run's only writer.
    """
    numbered = [path for path in find_checkpoints(checkpoint_dir) if path.name != FINAL]
    for path in [*numbered[keep:], *Path(checkpoint_dir).glob(".*.pt.*.tmp")]:
        path.unlink(missing_ok=True)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module behind `torch.compile`, whose parameter names have no prefix."""
    return getattr(model, "_orig_mod", model)


def _restore_model(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str | Path
) -> None:
    own = model.state_dict()
    for key, tensor in own.items():
        if key in state and state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is of another model: {key} has shape {tuple(state[key].shape)} there"
                f" and {tuple(tensor.shape)} here; use the configuration it was trained with"
            )
    if missing := own.keys() - state.keys():
        raise CheckpointError(f"{name} is of another model: it lacks {sorted(missing)[0]}")
    if unknown := state.keys() - own.keys():
        raise CheckpointError(f"{name} is of another model: it has {sorted(unknown)[0]} besides")
    model.load_state_dict(state)


def _is_refusal(error: Exception, path: Path) -> bool:
    """Return whether a file is whole, and refused for what it holds; not a file that was cut."""
    if not isinstance(error, pickle.UnpicklingError):
        return False
    with open(path, "rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80" or "GLOBAL" in str(error)


def _is_state(value: Any) -> bool:
    """Return whether `value` is what a module's `state_dict()` gives."""
    return isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values())


def _plain(value: Any) -> Any:
    """Turn NumPy scalars into Python numbers: `weights_only` refuses the former when it loads."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(inner) for inner in value)
    return value


def _step(path: Path) -> int:
    match = _NUMBERED.fullmatch(path.name)
    return int(match.group(2)) if match else 0


def _damaged(path: Path) -> str:
    others = _others(path.parent, without=path.name)
    return f"{path} is damaged or was cut short, so that it cannot be read{others}"


def _others(folder: Path, without: str = "") -> str:
    names = sorted(file.name for file in folder.glob("*.pt") if file.name != without)
    return f"; the folder also holds {', '.join(names)}" if names else ""
