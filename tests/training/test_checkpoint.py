"""Checkpoints: exact, atomic, and loaded without executing code."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import (
    BEST,
    FINAL,
    CheckpointWriter,
    checkpoint_content,
    checkpoint_name,
    find_checkpoints,
    load_checkpoint,
    read_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    write_checkpoint,
)
from horovod_lm.training.optimizer import build_optimizer, build_scheduler
from horovod_lm.utils.config import TrainingConfig
from horovod_lm.utils.distributed import map_tensors
from horovod_lm.utils.errors import CheckpointError

SHAPE = {"vocab_size": 17, "d_model": 8, "n_heads": 2, "n_layers": 2, "d_ff": 16, "max_seq_len": 8,
         "pad_token_id": 0, "dropout": 0.0}  # fmt: skip
TRAINING = TrainingConfig(warmup_steps=2, learning_rate=1e-2)


class Setup:
    """A small model in training: what a checkpoint is made of."""

    def __init__(self, seed: int = 0, **shape: int) -> None:
        torch.manual_seed(seed)
        self.model = TransformerLM(**(SHAPE | shape))
        self.optimizer = build_optimizer(self.model, TRAINING)
        self.scheduler = build_scheduler(self.optimizer, TRAINING, total_steps=20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def train(self, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            ids = torch.randint(0, 17, (2, 8), generator=torch.Generator().manual_seed(step))
            loss = self.model(ids, labels=ids)[1]
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, filename: str = FINAL, **changes: object) -> Path:
        wanted = {
            "model": self.model, "optimizer": self.optimizer, "epoch": 1, "step": 3, "loss": 2.5,
            "scheduler": self.scheduler, "scaler": self.scaler, "global_step": 13,
        }  # fmt: skip
        return save_checkpoint(**wanted | changes, checkpoint_dir=folder, filename=filename)


@pytest.fixture(scope="module")
def trained() -> Setup:
    setup = Setup()
    setup.train(4)
    return setup


@pytest.fixture(scope="module")
def content(trained, tmp_path_factory) -> bytes:
    """The bytes of a small checkpoint."""
    return trained.save(tmp_path_factory.mktemp("content")).read_bytes()


def complaint(call, *arguments, **named) -> str:
    """Return the sentence that a call ends with."""
    with pytest.raises(CheckpointError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_training_after_loading_equals_uninterrupted_training(tmp_path):
    one = Setup()
    one.train(4)
    path = one.save(tmp_path / "new" / "folder", best_loss=1.25, samples_seen=96, tokens=777,
                    config={"seed": 3}, tokenizer="{}")  # fmt: skip
    two = Setup(seed=1)  # other weights, no moments, another place in the schedule
    checkpoint = load_checkpoint(path, two.model, two.optimizer, two.scheduler, two.scaler)

    position = ("epoch", "step", "global_step", "loss", "best_loss", "samples_seen", "tokens")
    assert [checkpoint[key] for key in position] == [1, 3, 13, 2.5, 1.25, 96, 777]
    assert (checkpoint["config"], checkpoint["tokenizer"]) == ({"seed": 3}, "{}")
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name
    states = (setup.optimizer.state_dict()["state"] for setup in (one, two))
    for moments, others in zip(*(state.values() for state in states), strict=True):
        assert {"exp_avg", "exp_avg_sq", "step"} <= moments.keys()
        assert all(torch.equal(moments[name], others[name]) for name in moments)
    assert two.scaler.state_dict() == one.scaler.state_dict()
    assert two.scaler.get_scale() == 2.0**11  # it has grown once: not what a new one starts with
    assert two.scheduler.last_epoch == 4
    assert two.scheduler.get_last_lr() == one.scheduler.get_last_lr()
    assert one.train(5) == two.train(5)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path, trained):
    path = trained.save(tmp_path, model=torch.compile(trained.model))
    other = Setup(seed=1)
    load_checkpoint(path, torch.compile(other.model))
    weights = [setup.model.token_embedding.weight for setup in (trained, other)]
    assert torch.equal(*weights)


def test_numpy_scalars_come_back_as_python_numbers(tmp_path, trained):
    # Fault 10: weights_only refuses a NumPy scalar when the checkpoint is loaded, weeks later.
    path = trained.save(
        tmp_path, epoch=np.int64(2), loss=np.float32(0.5), extra=np.float16(2),
        config={"a": {"b": [np.float64(1.5), (np.int8(3), np.bool_(True))]}},
    )  # fmt: skip
    checkpoint = read_checkpoint(path)
    for key, value in {"epoch": 2, "loss": 0.5, "extra": 2.0}.items():
        assert checkpoint[key] == value and type(checkpoint[key]) is type(value), key
    assert checkpoint["config"] == {"a": {"b": [1.5, (3, True)]}}


def test_a_checkpoint_without_optimizer_loads_for_generation_only(tmp_path, trained):
    path = trained.save(tmp_path, optimizer=None, scheduler=None, scaler=None)
    other = Setup(seed=1)
    load_checkpoint(path, other.model)
    for part in ("optimizer", "scheduler", "scaler"):
        said = complaint(load_checkpoint, path, **{part: getattr(other, part)})
        assert f"has no {part} state" in said and str(path) in said


def test_the_folder_is_synced_after_the_rename(tmp_path, trained, monkeypatch):
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("rename"), replace(*a)))

    def recorded(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    trained.save(tmp_path)
    assert calls == ["file", "rename", "folder"]


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    setup, writer = Setup(), CheckpointWriter()
    setup.train(4)

    def content(step: int) -> dict:
        parts = (setup.model, setup.optimizer, setup.scheduler, setup.scaler)
        return checkpoint_content(*parts, global_step=step)

    def bits(path: Path) -> dict:
        return map_tensors(read_checkpoint(path), lambda tensor: tensor.numpy().tobytes())

    at_once = bits(write_checkpoint(content(4), tmp_path / "at once.pt"))
    disk, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (disk.wait(30), fsync(file)))
    for name in (BEST, FINAL):  # of one step: neither waits for the disk
        writer.write(content(4), tmp_path / name)
    old = tmp_path / checkpoint_name(0, 1)
    old.touch()
    writer.remove_old(tmp_path, keep=0)  # only after them: it also deletes temporary files
    setup.train(1)
    assert writer.is_busy() and old.exists() and not (tmp_path / BEST).exists()
    next_one = threading.Thread(target=writer.write, args=(content(5), tmp_path / "next.pt"))
    next_one.start()
    next_one.join(0.2)
    assert next_one.is_alive()  # it waits: the copy is still being written
    disk.set()
    next_one.join()
    writer.wait()
    assert not writer.is_busy() and not old.exists()
    assert bits(tmp_path / BEST) == bits(tmp_path / FINAL) == at_once
    next_one = bits(write_checkpoint(content(5), tmp_path / "at once.pt"))
    assert bits(tmp_path / "next.pt") == next_one != at_once

    writer.write(content(6), tmp_path / FINAL / "in a file.pt")
    assert "in a file.pt cannot be written" in complaint(writer.write, content(7), tmp_path / BEST)
    writer.write(content(7), tmp_path / BEST)
    writer.wait()
    assert read_checkpoint(tmp_path / BEST)["global_step"] == 7


def test_a_missing_checkpoint_names_what_is_there(tmp_path, trained):
    trained.save(tmp_path, "checkpoint_epoch0_step5.pt")
    said = complaint(read_checkpoint, tmp_path / BEST)
    assert "there is no checkpoint" in said and "checkpoint_epoch0_step5.pt" in said
    assert "there is no checkpoint" in complaint(read_checkpoint, tmp_path / "no" / "folder.pt")
    (tmp_path / "file").write_text("")
    said = complaint(lambda: trained.save(tmp_path / "file"))
    assert str(tmp_path / "file" / FINAL) in said and "cannot be written" in said


class Code:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda whole: Code(), "could execute code"),
        (lambda whole: {**whole, "model": {"w": Code()}}, "could execute code"),
        (lambda whole: {"a": 1}, "not a checkpoint of horovod_lm"),
        (lambda whole: whole["model"], "not a checkpoint of horovod_lm"),
        (lambda whole: whole | {"format": 1}, "has format 1, but this version reads format 2"),
        # As nanoGPT's ckpt.pt.
        (lambda whole: {"model": whole["model"]}, "has no 'format', but this version"),
        (lambda whole: whole | {"optimizer": {"state": {}}}, "incompatible optimizer state"),
    ],
)
def test_another_content_is_a_sentence(tmp_path, content, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    torch.save(change(torch.load(path, weights_only=True)), path)
    other = Setup()
    said = complaint(load_checkpoint, path, other.model, other.optimizer)
    assert says in said and str(path) in said
    assert not os.path.exists("executed")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"n_layers": 1}, "unexpected key blocks.1."),
        ({"n_layers": 3}, "missing key blocks.2."),
        ({"vocab_size": 19}, "token_embedding.weight has shape (17, 8), the model's has (19, 8)"),
    ],
)
def test_another_model_is_a_sentence_and_changes_nothing(tmp_path, trained, shape, says):
    path, other = trained.save(tmp_path), Setup(**shape)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    assert says in complaint(load_checkpoint, path, other.model)
    assert all(torch.equal(before[name], now) for name, now in other.model.state_dict().items())


def test_a_loaded_optimizer_has_the_settings_of_the_configuration(trained, tmp_path):
    path, other = trained.save(tmp_path), Setup()
    for group in other.optimizer.param_groups:
        group.update(weight_decay=0.5, lr=9.0)
    load_checkpoint(path, optimizer=other.optimizer)
    for group, saved in zip(
        other.optimizer.param_groups, trained.optimizer.param_groups, strict=True
    ):
        assert group["weight_decay"] == 0.5 and group["lr"] == saved["lr"]
    sgd = build_optimizer(other.model, TrainingConfig(optimizer="sgd"))
    said = complaint(load_checkpoint, path, optimizer=sgd)
    assert "it is of another optimizer; keep training.optimizer" in said


def test_the_newest_ones_and_best_and_final_are_kept(tmp_path):
    numbered = [checkpoint_name(*where) for where in ((0, 5), (1, 20), (1, 100), (2, 110))]
    for name in (*numbered, BEST, FINAL, "checkpoint_epoch5.pt"):
        (tmp_path / name).touch()
    remove_old_checkpoints(tmp_path, keep=2)
    kept = {BEST, FINAL, "checkpoint_epoch5.pt", *numbered[2:]}
    assert {path.name for path in tmp_path.iterdir()} == kept
    later = tmp_path / checkpoint_name(3, 120)  # of a run that was extended after its end
    later.touch()
    os.utime(later, (4e9, 4e9))
    found = [later.name, FINAL, numbered[3], numbered[2]]
    assert [path.name for path in find_checkpoints(tmp_path)] == found


@pytest.mark.parametrize("value", [Path("x"), [np.zeros(1)], {"a": (1, object())}])
def test_a_value_that_could_not_be_loaded_again_is_not_saved(tmp_path, trained, value):
    said = complaint(trained.save, tmp_path, FINAL, optimizer=None, note=value)
    assert said.startswith("a checkpoint cannot contain a value of the type ")
    assert not (tmp_path / FINAL).exists()
