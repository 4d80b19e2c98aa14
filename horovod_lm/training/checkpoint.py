"""Checkpoints: written atomically, in a thread while training goes on, loaded without running code.

A checkpoint contains everything that resuming and generation need: model, optimizer, scheduler,
position in the data, configuration and tokenizer.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from horovod_lm.utils.config import Config
from horovod_lm.utils.distributed import map_tensors
from horovod_lm.utils.errors import CheckpointError
from horovod_lm.utils.machine import sync_folder

FORMAT = 2  # 2: attention.{qkv,out}_proj and feed_forward.{up,down}_proj have these names
BEST, FINAL = "best_model.pt", "final_model.pt"
# Types that loading with weights_only accepts.
PLAIN = (bool, int, float, str, bytes, torch.Tensor, torch.Size, torch.dtype, torch.device)
# What is read from a checkpoint has these types, or is None.
TYPES: dict[str, type] = {
    "config": dict, "tokenizer": str, "optimizer": dict, "scheduler": dict, "scaler": dict,
    "data": dict, "epoch": int, "step": int, "global_step": int, "samples_seen": int, "tokens": int,
    "loss": float, "first_loss": float, "best_loss": float,
    "world_changes": int, "steps_replayed": int,
}  # fmt: skip
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
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    **extra: Any,
) -> Path:
    """Write one checkpoint atomically: to a temporary file, synced to disk, then renamed.

    If the writer is killed, the file is complete or absent. In distributed training only rank 0
    calls it. Returns the path of the file.

    Args:
        model: saved as its `state_dict()`; a compiled model under its uncompiled names.
        optimizer: None for a checkpoint that is only for generation.
        epoch: the current epoch, from 0.
        step: optimizer steps in that epoch.
        loss: the latest loss, in nats per token.
        checkpoint_dir: created if it does not exist.
        filename: for example `checkpoint_epoch5.pt`.
        scheduler, scaler: saved if they are given.
        global_step: optimizer steps since the start of the run.
        config: `Config.to_dict()`, to rebuild the model from the checkpoint alone.
        tokenizer: the tokenizer as JSON text, to generate from the checkpoint alone.
        **extra: more plain values, for example other fields of `TrainState`.

    Raises:
        CheckpointError: the folder cannot be written, the disk is full, or loading would refuse a
            value of this type.
    """
    content = checkpoint_content(
        model, optimizer, scheduler, scaler, config=config, tokenizer=tokenizer,
        epoch=epoch, step=step, global_step=global_step, loss=float(loss), **extra,
    )  # fmt: skip
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
    """Return the content of a checkpoint; arguments as for `save_checkpoint`.

    Its tensors are those of the model and the optimizer, not copies.
    """
    return {
        "format": FORMAT,
        **_plain(position),
        "model": uncompiled(model).state_dict(),
        "optimizer": None if optimizer is None else _plain(optimizer.state_dict()),
        "scheduler": None if scheduler is None else _plain(scheduler.state_dict()),
        "scaler": None if scaler is None else _plain(scaler.state_dict()),
        "config": None if config is None else _plain(dict(config)),
        "tokenizer": tokenizer,
    }


def write_checkpoint(content: Mapping[str, Any], path: Path) -> Path:
    """Write what `checkpoint_content` returned, atomically, or raise CheckpointError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a failed check of its own, after the system's error.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise CheckpointError(
            f"the checkpoint {path} cannot be written ({reason}): check the folder and the disk"
        ) from error
    finally:
        with suppress(OSError):  # it does not exist after a successful write
            temporary.unlink()
    return path


class CheckpointWriter:
    """Writes checkpoints in a thread, one after the other, while the caller trains on.

    `write` copies the state into CPU memory, which is kept for the next checkpoint. The caller
    waits for this copy, and before it for earlier files. A process that ends by itself completes
    its files first.
    """

    def __init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1)
        self._jobs: list[futures.Future[Any]] = []  # since the last `wait`
        self._position: dict[str, Any] = {}  # of the copy: all but its tensors
        self._copy: dict[str, Any] = {}
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def write(self, content: Mapping[str, Any], path: Path) -> None:
        """Copy what `checkpoint_content` returned, and begin to write it atomically.

        A second file with the same position has the same tensors, and does not wait for the first.
        Raises CheckpointError if an earlier file could not be written.
        """
        tensors = ("model", "optimizer")
        position = {key: value for key, value in content.items() if key not in tensors}
        if position != self._position:
            self.wait()
            self._position, self._copy = position, map_tensors(content, self._into_buffer)
        self._jobs.append(self._thread.submit(write_checkpoint, self._copy, path))

    def _into_buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        # Training changes tensors in place, so that each keeps its address.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._buffers:
            new = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[key] = new
        return self._buffers[key].copy_(tensor)

    def remove_old(self, checkpoint_dir: Path, keep: int) -> None:
        """Call `remove_old_checkpoints` when the files before are complete."""
        self._jobs.append(self._thread.submit(remove_old_checkpoints, checkpoint_dir, keep))

    def is_busy(self) -> bool:
        """Return whether a file is not complete."""
        return not all(job.done() for job in self._jobs)

    def wait(self) -> None:
        """Wait until all files are complete; raise CheckpointError if one could not be written."""
        futures.wait(self._jobs)
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()


def load_checkpoint(
    checkpoint_path: str | Path,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    scaler: Any | None = None,
) -> dict[str, Any]:
    """Read a checkpoint and restore the given objects from it.

    With Horovod, pass the wrapped optimizer: wrapping discards the optimizer's state. Returns the
    whole checkpoint, tensors on the CPU; its keys are the arguments of `save_checkpoint`.

    Raises:
        CheckpointError: as for `read_checkpoint`, or the file is of another model.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    restore(checkpoint, model, optimizer, scheduler, scaler, name=str(checkpoint_path))
    return checkpoint


def read_checkpoint(checkpoint_path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU, without executing code that a file may contain.

    Of a folder, the newest checkpoint that can be read is returned. A warning is printed for each
    newer one that cannot.

    Raises:
        CheckpointError: the file is missing, damaged, contains code, or is not a checkpoint.
    """
    path = Path(checkpoint_path)
    if path.is_dir():
        return _read_newest(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}{_others(path.parent)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warning about unpickling
            _compare_checksums(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a truncated file raises many types of errors
        if _is_refusal(error, path):
            raise CheckpointError(
                f"{path} is refused: it contains more than tensors and plain values, and loading"
                " it could execute code; load only checkpoints that save_checkpoint wrote"
            ) from None
        others = _others(path.parent, without=path.name)
        raise CheckpointError(f"{path} is damaged or truncated{others}") from None
    if not isinstance(checkpoint, dict) or not _is_state(checkpoint.get("model")):
        raise CheckpointError(f"{path} is not a checkpoint of horovod_lm: it has no 'model'")
    found = checkpoint.get("format")
    if not isinstance(found, int) or found != FORMAT:
        has = "no 'format'" if found is None else f"format {str(found)[:20]}"
        raise CheckpointError(
            f"{path} has {has}, but this version reads format {FORMAT}: load it with the program,"
            " or version of horovod_lm, that wrote it"
        )
    for key, kind in TYPES.items():
        value = checkpoint.get(key)
        is_count = not isinstance(value, int) or 0 <= value < 2**63
        if not isinstance(value, kind | None) or not is_count:
            raise CheckpointError(
                f"{path} is not a checkpoint of horovod_lm: its {key!r} has an invalid value"
            )
    return checkpoint


def _compare_checksums(path: Path) -> None:
    """Raise BadZipFile if bytes of a record have changed: torch does not compare checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                raise zipfile.BadZipFile


def restore(
    checkpoint: Mapping[str, Any],
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any | None = None,
    scaler: Any | None = None,
    name: str | Path = "the checkpoint",
) -> None:
    """Restore the given objects from a checkpoint's content; see `load_checkpoint`."""
    if model is not None:
        _restore_model(uncompiled(model), checkpoint["model"], name)
    for part, target in (("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
        if target is None:
            continue
        if checkpoint.get(part) is None:
            raise CheckpointError(f"{name} has no {part} state: it was saved for generation only")
        try:
            load = _load_optimizer if part == "optimizer" else _load_plain
            load(target, checkpoint[part])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{name} has an incompatible {part} state: {reason}") from None


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore moments and learning rates; the other settings stay those of the configuration."""
    groups = optimizer.state_dict()["param_groups"]
    for own, other in zip(groups, saved["param_groups"], strict=True):
        if own["params"] != other["params"] or ("betas" in own) != ("betas" in other):
            raise ValueError("it is of another optimizer; keep training.optimizer")
        rates = ("lr", "initial_lr")
        own.update({name: float(other[name]) for name in rates if name in other})
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for number, state in saved["state"].items():
        _check_moments(optimizer, parameters[number], state, f"parameter {number}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _check_moments(optimizer: Any, parameter: torch.Tensor, state: dict[str, Any], of: str) -> None:
    """Raise ValueError for moments of another shape: fused AdamW would write outside of them."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        state = {"step": None, "exp_avg": None, "exp_avg_sq": None, **state}
    elif not isinstance(optimizer, torch.optim.SGD) or state.get("momentum_buffer") is None:
        return
    for name, value in state.items():
        shape = () if name == "step" else parameter.shape
        fits = _is_dense(value) and value.shape == shape and value.is_contiguous()
        if not fits or not value.is_floating_point():
            raise ValueError(f"{name} of {of} does not fit the model")


def _load_plain(target: Any, saved: dict[str, Any]) -> None:
    """Restore a scheduler or a scaler, whose state is numbers."""
    if not _same_types(saved, target.state_dict()):
        raise ValueError("it is of another kind")
    target.load_state_dict(saved)


def _same_types(saved: Any, own: Any) -> bool:
    """Return whether nested plain values have the same types, where both have a key."""
    if isinstance(own, dict) and isinstance(saved, dict):
        return all(_same_types(saved[key], own[key]) for key in own.keys() & saved.keys())
    if isinstance(own, list) and isinstance(saved, list):
        return len(saved) == len(own) and all(map(_same_types, saved, own))
    return type(saved) is type(own) or all(isinstance(one, int | float) for one in (saved, own))


def find_checkpoints(checkpoint_dir: str | Path) -> list[Path]:
    """Return a run's numbered and final checkpoints, newest first."""
    folder = Path(checkpoint_dir)
    paths = filter(checkpoint_step, folder.glob("checkpoint_epoch*_step*.pt"))
    numbered, final = sorted(paths, key=checkpoint_step, reverse=True), folder / FINAL
    if not final.is_file():
        return numbered
    # A run that was extended after its end has numbered checkpoints that are newer than the final.
    written = final.stat().st_mtime_ns
    newer = [path for path in numbered if path.stat().st_mtime_ns > written]
    return [*newer, final, *(path for path in numbered if path not in newer)]


def _read_newest(folder: Path) -> dict[str, Any]:
    for path in find_checkpoints(folder):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            print(f"warning: {error}; trying an earlier one", file=sys.stderr)
    raise CheckpointError(
        f"{folder} has no checkpoint to resume from: start the run again without --resume, or with"
        " --resume auto --run-name NAME"
    )


def check_same_model(checkpoint: Mapping[str, Any], config: Config, name: str | Path) -> None:
    """Raise CheckpointError if a checkpoint's model has other sizes, and name the setting."""
    there, here = (checkpoint.get("config") or {}).get("model", {}), config.to_dict()["model"]
    for key in ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "max_seq_len"):
        if key in there and there[key] != here[key]:
            raise CheckpointError(
                f"{name} was trained with model.{key}={there[key]}, but the configuration has"
                f" {here[key]}: resume with the run's own config.yaml"
            )


def check_same_data(
    checkpoint: Mapping[str, Any], tokenizer: str, data: Mapping[str, str], name: str | Path
) -> None:
    """Raise CheckpointError if a checkpoint was trained with another tokenizer or other tokens.

    `tokenizer` is its JSON text, `data` a hash of each part of the data. A checkpoint is compared
    as far as it knows them.
    """
    saved = {**(checkpoint.get("data") or {}), "tokenizer": checkpoint.get("tokenizer")}
    here = {**data, "tokenizer": tokenizer}
    changed = [what for what, value in here.items() if saved.get(what) not in (None, value)]
    if changed:
        raise CheckpointError(
            f"{name} was trained with other data than those in data.data_dir ({', '.join(changed)}"
            " differ): restore the text or settings of its training, or start a new run"
        )


def checkpoint_name(epoch: int, global_step: int) -> str:
    """Return the name of a numbered checkpoint's file."""
    return f"checkpoint_epoch{epoch}_step{global_step}.pt"


def checkpoint_step(path: Path) -> int:
    """Return the number of optimizer steps before a numbered checkpoint, from its file's name."""
    match = _NUMBERED.fullmatch(path.name)
    return int(match.group(2)) if match else 0


def remove_old_checkpoints(checkpoint_dir: str | Path, keep: int) -> None:
    """Delete all but the `keep` newest numbered checkpoints; best and final are kept.

    Also deletes temporary files of killed writers: the caller is the run's only writer.
    """
    numbered = [path for path in find_checkpoints(checkpoint_dir) if path.name != FINAL]
    for path in [*numbered[keep:], *Path(checkpoint_dir).glob(".*.pt.*.tmp")]:
        path.unlink(missing_ok=True)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside a `torch.compile` wrapper, which adds a prefix to names."""
    return getattr(model, "_orig_mod", model)


def _restore_model(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str | Path
) -> None:
    own = model.state_dict()
    problems = [
        f"{key} has shape {tuple(state[key].shape)}, the model's has {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems += [
        f"{key} has the type {state[key].dtype}"
        for key, tensor in own.items()
        if key in state and state[key].is_floating_point() != tensor.is_floating_point()
    ]
    problems += [f"missing key {key}" for key in sorted(own.keys() - state.keys())]
    problems += [f"unexpected key {key}" for key in sorted(state.keys() - own.keys())]
    if problems:
        raise CheckpointError(
            f"{name} does not match the model: {problems[0]}; use the configuration of its training"
        )
    model.load_state_dict(state)


def _is_refusal(error: Exception, path: Path) -> bool:
    """Return whether a file is complete and refused for its content, not truncated."""
    if not isinstance(error, pickle.UnpicklingError):
        return False
    with open(path, "rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80" or "GLOBAL" in str(error)


def _is_state(value: Any) -> bool:
    """Return whether `value` is a module's `state_dict()`, of dense tensors."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and _is_dense(tensor) for key, tensor in value.items()
    )


def _is_dense(value: Any) -> bool:
    """Return whether a value is a tensor with a number for each element."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python numbers; raise CheckpointError for what loading refuses."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner) for inner in value)
    if value is None or isinstance(value, PLAIN):
        return value
    raise CheckpointError(
        f"a checkpoint cannot contain a value of the type {type(value).__name__}: convert it to a"
        " tensor, a number, a text, or a list or dict of them"
    )


def _others(folder: Path, without: str = "") -> str:
    names = sorted(file.name for file in folder.glob("*.pt") if file.name != without)
    return f"; the folder also contains {', '.join(names)}" if names else ""
