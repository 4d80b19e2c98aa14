"""Training from outside: ways to start it, errors, a user's own text, intervals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from horovod_lm import generate
from horovod_lm.train import main, run_distributed_training
from horovod_lm.training.checkpoint import read_checkpoint, save_checkpoint
from horovod_lm.training.metrics import read_metrics
from horovod_lm.training.optimizer import build_optimizer
from horovod_lm.training.trainer import build_model, check_can_compile
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.config import load_config
from horovod_lm.utils.errors import CheckpointError, ConfigError, DivergenceError

RUN = ("--config", "configs/tiny.yaml", "--set", "training.max_steps=12")
WITHOUT_HOROVOD = """
import sys
class NoHorovod:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoHorovod())
"""


def flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--resume runs/nowhere", "runs/nowhere is not a run"),
        ("--resume nowhere --elastic", "each host of an elastic run needs the run's folder"),
        ("--config configs/tni.yaml", "there is no configuration file configs/tni.yaml"),
        ("--set training.lr=1", "lr is not a setting"),
        ("--set model.d_model=10000000000", "the model does not fit into memory: use smaller"),
        ("--set data.source=files --set data.path=missing.txt --set data.data_dir=x", "missing.t"),
        ("--set training.device=cuda", "training.device is cuda, and torch sees no GPU on "),
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


TOO_FAST = ("training.optimizer=sgd", "training.learning_rate=3e3", "training.warmup_steps=0",
            "training.max_grad_norm=null", "training.eval_interval=99",
            "training.keep_last_checkpoints=1", "training.checkpoint_interval=1")  # fmt: skip


@pytest.mark.horovod
def test_training_that_diverges_ends_on_every_rank_and_keeps_a_good_checkpoint(tiny_project, start):
    arguments = [*RUN, *flags(TOO_FAST), "--run-name", "fast"]
    command = start(["-m", "horovod_lm.train", *arguments], ranks=2)
    output = command.wait(60).output
    said = (
        r"error: the loss is (?:nan|inf) at step (\d+), so .* checkpoint is (.*); to resume: (.*)"
    )
    [(step, name, call)] = re.findall(said, output)
    good = tiny_project / "runs" / "fast" / "checkpoints" / name
    assert name == f"checkpoint_epoch0_step{int(step) - 2}.pt"  # the next one gave this loss
    assert str(good.relative_to(tiny_project)) in call
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(good)["model"].values())
    assert command.left_behind() == []


def test_a_model_whose_validation_loss_is_not_finite_is_not_saved(tiny_project, monkeypatch):
    monkeypatch.chdir(tiny_project)
    settings = [*TOO_FAST[:-2], "training.max_steps=1", "training.learning_rate=1e30"]
    with pytest.raises(DivergenceError, match="validation loss is nan at step 1.*no good checkpoi"):
        main(["--config", "configs/tiny.yaml", *flags(settings), "--run-name", "faster"])
    assert not [*tiny_project.glob("runs/faster/checkpoints/*.pt")]


def test_a_run_of_the_users_own_text_generates_and_resumes_with_its_tokens(
    tiny_project, monkeypatch, capsys
):
    monkeypatch.chdir(tiny_project)
    text = "".join(f"The {n}th goose went over the hill, and it was high.\n" for n in range(400))
    (tiny_project / "growing.txt").write_text(text)
    own = flags(["data.source=files", "data.path=growing.txt", "data.data_dir=growing"])
    main([*RUN, *own, "--run-name", "growing", "--set", "training.max_steps=6"])
    assert losses(tiny_project / "runs/growing")[-1] < losses(tiny_project / "runs/growing")[0]
    assert "6 steps in" in capsys.readouterr().out
    generate.main(["--checkpoint", "runs/growing", "--prompt", "The", "--max-new-tokens", "9"])
    assert re.match("The.", capsys.readouterr().out, re.DOTALL)
    metadata = tiny_project / "growing" / "metadata.json"
    before = metadata.read_bytes()
    (tiny_project / "growing.txt").write_text(text + text.upper())
    again = ["--resume", "runs/growing", "--set", "training.max_steps=8"]
    assert main(again) == 0
    assert metadata.read_bytes() == before
    main([*RUN, *own, "--run-name", "another", "--set", "training.max_steps=1"])  # prepares it
    assert "1 step in" in capsys.readouterr().out
    differ = r"\(training tokens, validation tokens, tokenizer differ\)"
    with pytest.raises(CheckpointError, match=f"with other data than .* {differ}"):
        main(again)


def test_resume_auto_starts_the_named_run_if_it_has_no_checkpoint(
    tiny_project, monkeypatch, capsys
):
    monkeypatch.chdir(tiny_project)
    checkpoints = tiny_project / "runs" / "again" / "checkpoints"
    call = ["--resume", "auto", "--run-name", "again", *RUN]
    for steps, says in ((6, ""), (8, "resuming at step 6 of 8"), (9, "is now runs/again.1")):
        assert main([*call, "--set", f"training.max_steps={steps}"]) == 0
        assert says in capsys.readouterr().out
        if steps == 8:  # as if it had been killed before it saved
            for path in checkpoints.glob("*.pt"):
                path.unlink()
            with pytest.raises(CheckpointError, match="no checkpoint to resume from: start the ru"):
                main(["--resume", "runs/again"])
    with pytest.raises(CheckpointError, match="there is a run again already"):
        main(["--resume", "runs/again.1", "--run-name", "again"])
    # A checkpoint that is not in a run's folder.
    (checkpoints / "final_model.pt").rename(tiny_project / "kept.pt")
    with pytest.raises(CheckpointError, match="kept.pt is not a run: .* add --config and --run-n"):
        main(["--resume", "kept.pt"])
    assert main(["--resume", "kept.pt", "--run-name", "more", *RUN]) == 0
    assert "resuming at step 9 of 12" in capsys.readouterr().out


WITHOUT_THE_RUN = """
import os, sys
from horovod_lm.train import main
from horovod_lm.utils.cli import run_cli
if os.environ["HOROVOD_RANK"] == "1":
    os.makedirs("other host/configs", exist_ok=True)
    os.chdir("other host")
run_cli(main)
"""


@pytest.mark.horovod
def test_only_rank_0_needs_the_files_of_a_run(tiny_project, monkeypatch, start):
    monkeypatch.chdir(tiny_project)
    main([*RUN, "--run-name", "alone on rank 0"])
    (tiny_project / "without.py").write_text(WITHOUT_THE_RUN)
    resume = ["without.py", "--resume", "runs/alone on rank 0", "--set", "training.max_steps=14"]
    finished = start(resume, ranks=2).wait(60)
    assert finished.code == 0, finished.output
    assert "resuming at step 12 of 14" in finished.output


@pytest.mark.horovod
def test_on_two_ranks_a_users_error_is_printed_once_and_nothing_is_overwritten(
    tiny_project, monkeypatch, capsys, start
):
    monkeypatch.chdir(tiny_project)
    folder = tiny_project / "runs" / "wide"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("an earlier run")
    main([*RUN, "--run-name", "wide"])
    assert "an earlier run of this name is now runs/wide.1" in capsys.readouterr().out
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


OF_RANK_1_ALONE = """
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.distributed import get_rank, metric_average, setup_horovod
from horovod_lm.utils.errors import DataError
def main(argv):
    setup_horovod()
    if get_rank() == 1:
        raise DataError("the disk of this rank alone is empty")
    metric_average(1.0, name="never")
run_cli(main)
"""


@pytest.mark.horovod
def test_an_error_of_one_rank_alone_is_told_too(start):
    command = start(["-c", OF_RANK_1_ALONE], ranks=2)
    finished = command.wait(60)
    assert finished.code != 0
    assert finished.output.count("[1]<stderr>:error: the disk of this rank alone is empty") == 1
    assert command.left_behind() == []


def test_a_checkpoint_that_knows_only_what_the_contract_names_can_be_resumed(
    tiny_project, monkeypatch, capsys
):
    """Saved by a user's own loop: no tokens, no best loss, no position in the data."""
    monkeypatch.chdir(tiny_project)
    unwritable = [f"paths.{kind}_dir=configs/tiny.yaml" for kind in ("log", "tensorboard")]
    config = load_config("configs/tiny.yaml", ["training.max_steps=4", *unwritable])
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
    # Logs and events that cannot be written do not end training, and this is said once.
    warnings = capsys.readouterr().err.splitlines()
    for line, path in zip(warnings, ("tiny.yaml/rank0.jsonl", "tiny.yaml"), strict=True):
        assert f"{path} cannot be written (File exists): training goes on without it" in line
    # Environment variables, which may hold secrets, are not in checkpoints.
    assert b"a-secret" not in result.checkpoint.read_bytes()
    assert b"per_gpu_batch_size" in result.checkpoint.read_bytes()  # not compressed


def test_intervals_count_optimizer_steps(tiny_project, monkeypatch, capsys):
    monkeypatch.chdir(tiny_project)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 10, "eval_interval": 4,
                "log_interval": 5, "checkpoint_interval": 3,
                "keep_last_checkpoints": 2}  # fmt: skip
    given = flags([f"training.{name}={value}" for name, value in settings.items()])
    assert main(["--config", "configs/tiny.yaml", "--run-name", "intervals", *given]) == 0
    folder = tiny_project / "runs" / "intervals"
    assert re.findall(r"^step (\d+)/10 ", capsys.readouterr().out, re.MULTILINE) == ["1", "5", "10"]
    assert [row["step"] for row in read_metrics(folder, "validation")] == [4, 8, 10]
    kept = {path.name for path in folder.glob("checkpoints/*.pt")}
    assert kept == {
        "best_model.pt", "final_model.pt",
        "checkpoint_epoch0_step6.pt", "checkpoint_epoch0_step9.pt",
    }  # fmt: skip
