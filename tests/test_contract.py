"""Every call that the contract shows, with its imports, argument names, order and defaults.

The contract's package is called `src`; here it is `horovod_lm`. Each test below is one of its
snippets, run on a tiny configuration. Snippets that ask for `device="cuda"` must work without one.
"""

from __future__ import annotations

import inspect
import io
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def in_project(tiny_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_project)
        yield tiny_project


@pytest.fixture(scope="module")
def trained(in_project):
    """The contract's training call; returns the folder of its checkpoints."""
    from horovod_lm.train import run_distributed_training
    from horovod_lm.utils.config import load_config
    from horovod_lm.utils.distributed import setup_horovod

    config = load_config("configs/tiny.yaml", ["training.max_steps=3"])
    world_size, rank, local_rank, _ = setup_horovod(require_distributed=False)
    run_distributed_training(
        config=config, rank=rank, world_size=world_size, local_rank=local_rank,
        resume_checkpoint=None, run_name="my_training_run",
    )  # fmt: skip
    assert defaults(run_distributed_training) == {"resume_checkpoint": None, "run_name": None}
    return in_project / "runs/my_training_run/checkpoints"


def defaults(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_model_api():
    from horovod_lm.models.transformer_lm import TransformerLM

    assert defaults(TransformerLM) == {
        "vocab_size": 50257, "d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 3072,
        "max_seq_len": 512, "dropout": 0.1, "pad_token_id": 50256,
        "gradient_checkpointing": False,
    }  # fmt: skip
    model = TransformerLM(
        vocab_size=50257, d_model=8, n_heads=2, n_layers=1, d_ff=16, max_seq_len=32, dropout=0.1,
        pad_token_id=50256, gradient_checkpointing=False,
    )  # fmt: skip
    input_ids = torch.randint(50257, (2, 10))
    attention_mask = torch.ones_like(input_ids)
    logits, loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids)
    assert logits.shape == (2, 10, 50257)
    assert loss.ndim == 0 and loss.requires_grad
    generated_ids = model.generate(
        input_ids=input_ids, max_new_tokens=5, temperature=0.8, top_k=50, top_p=0.9,
        eos_token_id=50256,
    )  # fmt: skip
    assert generated_ids.shape[0] == 2 and 10 < generated_ids.shape[1] <= 15
    assert torch.equal(generated_ids[:, :10], input_ids)
    generate = defaults(TransformerLM.generate)
    wanted = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    assert wanted.items() <= generate.items() and generate["eos_token_id"] == 50256


def test_training_api(trained):
    assert (trained / "final_model.pt").is_file() and (trained / "best_model.pt").is_file()


def test_checkpoint_api(tmp_path, monkeypatch):
    from horovod_lm.models.transformer_lm import TransformerLM
    from horovod_lm.train import load_checkpoint, save_checkpoint

    monkeypatch.chdir(tmp_path)
    model = TransformerLM(20, 8, 2, 1, 16, 8, pad_token_id=0)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    epoch, step, loss, global_step = 5, 7, 1.25, 123
    save_checkpoint(
        model=model, optimizer=optimizer, epoch=epoch, step=step, loss=loss,
        checkpoint_dir="checkpoints", filename="checkpoint_epoch5.pt", scheduler=scheduler,
        scaler=scaler, global_step=global_step,
    )  # fmt: skip
    checkpoint = load_checkpoint(
        checkpoint_path="checkpoints/checkpoint_epoch5.pt", model=model, optimizer=optimizer,
        scheduler=scheduler, scaler=scaler,
    )  # fmt: skip
    found = {name: checkpoint[name] for name in ("epoch", "step", "loss", "global_step")}
    assert found == {"epoch": 5, "step": 7, "loss": 1.25, "global_step": 123}


def test_data_api(in_project):
    from horovod_lm.data import get_dataloaders, load_preprocessed_data
    from horovod_lm.utils.config import load_config

    default = defaults(load_preprocessed_data)["data_dir"]
    assert default == "notebooks/data/preprocessed/v1"
    train_dataset, val_dataset = load_preprocessed_data(data_dir="data")
    assert len(train_dataset) > len(val_dataset) > 0
    config = load_config("configs/tiny.yaml")
    train_dataloader, val_dataloader = get_dataloaders(config)
    assert next(iter(train_dataloader))["input_ids"].shape == (4, 32)
    assert next(iter(val_dataloader))["labels"].dtype == torch.long


def test_distributed_api():
    from horovod_lm.utils.distributed import (
        get_local_rank,
        get_rank,
        get_world_size,
        is_main_process,
        metric_average,
        setup_horovod,
    )

    assert defaults(setup_horovod)["require_distributed"] is True
    world_size, rank, local_rank, use_cuda = setup_horovod(require_distributed=False)
    assert (get_rank(), get_world_size(), get_local_rank()) == (rank, world_size, local_rank)
    assert use_cuda == torch.cuda.is_available()
    assert metric_average(torch.tensor(2.5), name="train_loss") == 2.5
    assert is_main_process() == (rank == 0)


@pytest.mark.horovod
def test_distributed_optimizer_api(tmp_path):
    """In a process of its own, because it initialises Horovod."""
    script = tmp_path / "snippet.py"
    script.write_text(
        "from horovod_lm.utils.distributed import setup_horovod\n"
        "from horovod_lm.models.transformer_lm import TransformerLM\n"
        "world_size, rank, local_rank, use_cuda = setup_horovod(require_distributed=True)\n"
        "model = TransformerLM(20, 8, 2, 1, 16, 8, pad_token_id=0)\n"
        "import horovod.torch as hvd\n"
        "from torch.optim import AdamW\n"
        "optimizer = AdamW(model.parameters(), lr=3e-4)\n"
        "optimizer = hvd.DistributedOptimizer(\n"
        "    optimizer,\n"
        "    named_parameters=model.named_parameters(),\n"
        "    compression=hvd.Compression.none\n"
        ")\n"
        "hvd.broadcast_parameters(model.state_dict(), root_rank=0)\n"
        "print('ranks:', world_size)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ranks: 1"


def test_generation_api(trained, capfd):
    from horovod_lm.generate import generate_text, load_model_for_generation
    from horovod_lm.utils import distributed

    distributed._print_once.cache_clear()
    model, tokenizer, config = load_model_for_generation(
        checkpoint_path=str(trained / "best_model.pt"),
        config_path="configs/tiny.yaml",
        device="cuda",
    )
    generated_texts = generate_text(
        model=model, tokenizer=tokenizer, prompt="Once upon a time", max_new_tokens=10,
        temperature=0.8, top_k=50, top_p=0.9, num_samples=2, device="cuda",
    )  # fmt: skip
    # Where there is no GPU, the CPU is used, and this is said once.
    notes = capfd.readouterr().err.count("note: there is no cuda here: the CPU is used")
    assert notes == (0 if torch.cuda.is_available() else 1)
    assert len(generated_texts) == 2
    assert all(text.startswith("Once upon a time") for text in generated_texts)
    wanted = {
        "max_new_tokens": 100, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "num_samples": 1,
    }  # fmt: skip
    assert wanted.items() <= defaults(generate_text).items()
    assert config.model.d_model == 16


def test_interactive_generation_api(trained, monkeypatch, capsys):
    from horovod_lm.generate import interactive_generation, load_model_for_generation

    model, tokenizer, config = load_model_for_generation(trained / "best_model.pt")
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\nquit\n"))
    interactive_generation(model=model, tokenizer=tokenizer, config=config, device="cuda")
    assert "Once upon a time" in capsys.readouterr().out


def test_configuration_api(monkeypatch):
    from horovod_lm.data import load_preprocessed_data
    from horovod_lm.generate import generate_text
    from horovod_lm.models.transformer_lm import TransformerLM
    from horovod_lm.utils.config import Config, load_config

    monkeypatch.chdir(ROOT)
    config = load_config("configs/config.yaml")
    assert isinstance(config, Config)
    model_dim = config.model.d_model
    learning_rate = config.training.learning_rate
    batch_size = config.training.per_gpu_batch_size
    config_dict = config.to_dict()
    assert (model_dim, learning_rate, batch_size) == (768, 3e-4, 16)
    assert Config().model.model_dump() == config.model.model_dump() == defaults(TransformerLM)
    assert Config().generation.model_dump().items() <= defaults(generate_text).items()
    assert Config().data.data_dir == defaults(load_preprocessed_data)["data_dir"]
    sections = ("model", "training", "data", "generation", "paths", "distributed")
    assert set(sections) <= set(config_dict)
    assert config.distributed.compression == "none"
    assert {"checkpoint_dir", "log_dir", "tensorboard_dir"} <= set(config_dict["paths"])
