"""Training from outside: ways to start it, errors, a user's own text, intervals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from horovod_lm.train import main, run_distributed_training
from horovod_lm.training.checkpoint import read_checkpoint, save_checkpoint
from horovod_lm.training.metrics import read_metrics
from horovod_lm.training.optimizer import build_optimizer
from horovod_lm.training.trainer import build_model, check_can_compile
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.config import load_config
from horovod_lm.utils.errors import ConfigError

RUN = ("--config", "configs/tiny.yaml", "--set", "training.max_steps=12")
WITHOUT_HOROVOD = """
import sys
class NoHorovod:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoHorovod())
"""


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder, "train")]


@pytest.mark.horovod
def test_every_way_to_start_trains_the_same_loop(tiny_project, train, start):
    """horovodrun -np 2 and -np 1, one plain process, and one where Horovod cannot be imported."""
    runs = tiny_project / "runs"
    train(*RUN, "--run-name", "np2", "--set", "training.per_gpu_batch_size=2",
          "--set", "model.dropout=0.0", ranks=2)  # fmt: skip
    same = (*RUN, "--set", "model.dropout=0.0")
    train(*same, "--run-name", "np1", ranks=1)
    train(*same, "--run-name", "alone")
    (tiny_project / "without.py").write_text(
        WITHOUT_HOROVOD + "from horovod_lm.train import main\nsys.exit(main())\n"
    )
    finished = start(["without.py", *same, "--run-name", "without"]).wait(120)
    assert finished.code == 0, finished.output
    assert finished.output.count("Horovod is not installed: training alone") == 1
    assert len(losses(runs / "alone")) == 12
    assert losses(runs / "np1") == losses(runs / "alone") == losses(runs / "without")
    assert losses(runs / "np2") == pytest.approx(losses(runs / "alone"), rel=1e-5)
    for name in ("np2", "np1", "alone", "without"):
        model = read_checkpoint(runs / name / "checkpoints" / "final_model.pt")["model"]
        assert "blocks.1.attention.qkv_proj.weight" in model  # fault 12: no stand-in model


def test_compile_is_refused_where_torch_cannot_link(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/a student/torch/__init__.py")
    with pytest.raises(ConfigError, match="torch is in /home/a student/torch and .*compile=false"):
        check_can_compile(torch.device("cpu"))


def test_the_users_own_text_trains_and_talks(tiny_project, train, start):
    text = "".join(f"The {n}th goose went over the hill, and it was high.\n" for n in range(400))
    (tiny_project / "my_book.txt").write_text(text, encoding="utf-8")
    train(*RUN, "--set", "data.source=files", "--set", "data.path=my_book.txt",
          "--set", "data.data_dir=my_data", "--run-name", "mine")  # fmt: skip
    assert losses(tiny_project / "runs" / "mine")[-1] < losses(tiny_project / "runs" / "mine")[0]
    arguments = ["--checkpoint", "runs/mine", "--prompt", "The", "--max-new-tokens", "20"]
    talk = start(["-m", "horovod_lm.generate", *arguments]).wait(60)
    assert talk.code == 0, talk.output
    assert "The" in talk.output and len(talk.output.strip()) > len("The")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--resume runs/nowhere", "runs/nowhere is not a run"),
        ("--resume auto --run-name nobody", "auto is not a run"),
        ("--config configs/tni.yaml", "there is no configuration file configs/tni.yaml"),
        ("--config configs/tiny.yaml --set training.lr=1", "lr is not a setting"),
        (
            "--config configs/tiny.yaml --set data.source=files --set data.path=missing.txt"
            " --set data.data_dir=none",
            "missing.txt",
        ),
        (
            "--config configs/tiny.yaml --set training.device=cuda",
            "training.device is cuda, and torch sees no GPU on ",
        ),
    ],
)
def test_a_users_error_is_one_sentence(tiny_project, monkeypatch, capfd, arguments, sentence):
    monkeypatch.chdir(tiny_project)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run_cli(main, arguments.split())
    printed = capfd.readouterr()
    assert printed.err.startswith("error: ") and sentence in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.horovod
def test_on_two_ranks_a_users_error_is_printed_once_and_nothing_is_overwritten(
    tiny_project, train, start
):
    folder = tiny_project / "runs" / "wide"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("an earlier run")
    finished = train(*RUN, "--run-name", "wide")
    assert "an earlier run of this name is now runs/wide.1" in finished.output
    assert (tiny_project / "runs" / "wide.1" / "run.json").read_text() == "an earlier run"
    checkpoint = folder / "checkpoints" / "final_model.pt"
    arguments = ["--resume", str(checkpoint), "--set", "model.d_model=32"]
    command = start(["-m", "horovod_lm.train", *arguments], ranks=2)
    finished = command.wait(60)
    assert finished.code != 0
    assert finished.output.count("was trained with model.d_model=16") == 1
    damaged = checkpoint.with_name("damaged.pt")  # read by rank 0 alone
    damaged.write_bytes(b"x")
    finished = start(["-m", "horovod_lm.train", "--resume", str(damaged)], ranks=2).wait(60)
    assert finished.output.count("is damaged or truncated") == 1
    assert "Traceback" not in finished.output
    assert command.left_behind() == []


@pytest.mark.horovod
def test_an_error_of_one_rank_alone_is_told_too(tiny_project, start):
    (tiny_project / "alone.py").write_text(
        "from horovod_lm.utils.cli import run_cli\n"
        "from horovod_lm.utils.distributed import get_rank, metric_average, setup_horovod\n"
        "from horovod_lm.utils.errors import DataError\n"
        "def main(argv):\n"
        "    setup_horovod()\n"
        "    if get_rank() == 1:\n"
        "        raise DataError('the disk of this rank alone is empty')\n"
        "    metric_average(1.0, name='never')\n"
        "run_cli(main)\n"
    )
    command = start(["alone.py"], ranks=2)
    finished = command.wait(60)
    assert finished.code != 0
    assert finished.output.count("[1]<stderr>:error: the disk of this rank alone is empty") == 1
    assert command.left_behind() == []


def test_a_checkpoint_that_knows_only_what_the_contract_names_can_be_resumed(
    tiny_project, monkeypatch
):
    """Saved by a user's own loop: no tokens, no best loss, no position in the data."""
    monkeypatch.chdir(tiny_project)
    config = load_config("configs/tiny.yaml", ["training.max_steps=4"])
    config = config.with_overrides({"distributed.environment": {"TOKEN": "a-secret"}})
    model = build_model(config, eot_id=0)
    optimizer = build_optimizer(model, config.training)
    saved = save_checkpoint(
        model, optimizer, epoch=0, step=2, loss=3.5, checkpoint_dir="own", filename="own.pt",
        global_step=2,
    )  # fmt: skip
    result = run_distributed_training(config, 0, 1, 0, resume_checkpoint=saved, run_name="own")
    assert result.steps == 4 and result.validation_loss > 0
    assert [row["step"] for row in read_metrics(result.run_dir, "train")] == [3, 4]
    # Environment variables, which may hold secrets, are not in checkpoints.
    assert b"a-secret" not in result.checkpoint.read_bytes()
    assert b"per_gpu_batch_size" in result.checkpoint.read_bytes()  # not compressed


def test_intervals_count_optimizer_steps(tiny_project, train):
    finished = train(
        "--config", "configs/tiny.yaml", "--run-name", "intervals",
        "--set", "training.gradient_accumulation_steps=2", "--set", "training.max_steps=10",
        "--set", "training.eval_interval=4", "--set", "training.log_interval=5",
        "--set", "training.checkpoint_interval=3", "--set", "training.keep_last_checkpoints=2",
    )  # fmt: skip
    folder = tiny_project / "runs" / "intervals"
    assert re.findall(r"^step (\d+)/10 ", finished.output, re.MULTILINE) == ["1", "5", "10"]
    assert [row["step"] for row in read_metrics(folder, "validation")] == [4, 8, 10]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {
        "best_model.pt", "final_model.pt",
        "checkpoint_epoch0_step6.pt", "checkpoint_epoch0_step9.pt",
    }  # fmt: skip
