"""A step reads no number from its device, one that is not finite changes nothing, and the MFU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from horovod_lm.training import optimizer, run_logger
from horovod_lm.training.checkpoint import read_checkpoint
from horovod_lm.training.metrics import read_metrics
from horovod_lm.training.run_dir import RunFolder
from horovod_lm.training.trainer import Trainer, build_model, run_distributed_training
from horovod_lm.utils.config import load_config
from horovod_lm.utils.distributed import agree_on_devices, map_tensors, start_reduce_sum
from horovod_lm.utils.errors import DivergenceError
from horovod_lm.utils.interrupts import StopRequest
from horovod_lm.utils.progress import ProgressLine


@contextlib.contextmanager
def trainer_of(project, name: str, **training) -> Iterator[Trainer]:
    config = load_config(project / "configs" / "tiny.yaml", {"training": training})
    trainer = Trainer(
        config, RunFolder.of(config, name), 0, 1, agree_on_devices("cpu", 0),
        ProgressLine(enabled=False), StopRequest(),
    )  # fmt: skip
    trainer.model.train()
    with contextlib.closing(trainer):
        yield trainer


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from results, which are floats; a GPU would be waited for.

    Token ids are checked and counted before they are copied to a GPU.
    """

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += arguments[0].is_floating_point()
        return function(*arguments, **(named or {}))


def test_a_step_reads_no_number_before_the_next_one_is_under_way(tiny_project):
    with trainer_of(tiny_project, "unread", gradient_accumulation_steps=2) as trainer:
        batches = iter(trainer.train_loader)
        with Reads() as reads:
            trainer.train_step(batches)
            assert reads.count == 0
            trainer.train_step(batches)
            assert reads.count == 1  # the gradient norm of the first
        assert [row["step"] for row in read_metrics(trainer.run_folder.run_dir)] == [1]
        trainer.evaluate()
        rows = read_metrics(trainer.run_folder.run_dir)
        assert [(row["phase"], row["step"]) for row in rows] == [
            ("train", 1), ("train", 2), ("validation", 2)]  # fmt: skip
        assert trainer.state.loss == rows[1]["loss"] and trainer.state.tokens == rows[1]["tokens"]
    # One process does not copy its sums to the CPU.
    assert start_reduce_sum(torch.zeros(3, device="meta"), "sums").device.type == "meta"


def test_a_resumed_run_keeps_the_precision_that_was_measured(tiny_project, monkeypatch):
    folder = tiny_project / "runs" / "measured"
    monkeypatch.setattr(optimizer, "has_fast_bfloat16", lambda device: True)
    for speedup, steps in ((2.0, 2), (0.5, 4)):
        monkeypatch.setattr(optimizer, "bfloat16_speedup", lambda *_, found=speedup: found)
        settings = {"training.amp_dtype": "auto", "training.max_steps": steps}
        config = load_config(tiny_project / "configs" / "tiny.yaml", settings)
        checkpoints = folder / "checkpoints"
        resume = checkpoints if steps > 2 else None
        run_distributed_training(config, 0, 1, 0, resume, "measured")
        assert load_config(folder / "config.yaml").training.amp_dtype == "bfloat16"
        saved = read_checkpoint(checkpoints)
        assert saved["config"]["training"]["amp_dtype"] == "bfloat16"
        assert saved["global_step"] == steps


def test_the_log_has_the_mfu_of_known_gpus_only(tiny_project, monkeypatch, capsys):
    for peak in (None, 1e9):
        monkeypatch.setattr(run_logger, "bfloat16_peak", lambda device, peak=peak: peak)
        config = load_config(tiny_project / "configs" / "tiny.yaml", {"training.max_steps": 2})
        result = run_distributed_training(config, 0, 1, 0, None, f"mfu-{peak}")
        lines = (result.run_dir / "logs" / "rank0.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("phase") == "train"]
        assert ("MFU" in capsys.readouterr().out) == bool(peak)
        assert all(("mfu" in row) == bool(peak) for row in rows)
    flops = build_model(config).flops_per_token()
    for row in rows:
        assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / 1e9)


def bits(trainer: Trainer) -> dict:
    """Return the bytes of every parameter and moment."""
    content = trainer.content()
    parts = {"model": content["model"], "moments": content["optimizer"]["state"]}
    return map_tensors(parts, lambda tensor: tensor.numpy().tobytes())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_ends_the_run_with_the_parameters_before_it(tiny_project, kind):
    with trainer_of(tiny_project, f"bad-{kind}", optimizer=kind) as trainer:
        batches = iter(trainer.train_loader)
        trainer.train_step(batches)
        before = bits(trainer)
        one = trainer.model.final_norm.bias
        hook = one.register_hook(lambda gradient: gradient / 0)
        trainer.train_step(batches)
        hook.remove()
        says = r"the gradient norm is (nan|inf) at step 2, so training ended without saving"
        with pytest.raises(DivergenceError, match=says):
            trainer.train_step(batches)
        assert bits(trainer) == before
