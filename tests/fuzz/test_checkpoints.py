"""Any file as a checkpoint: it is loaded, or one sentence; nothing in it is executed."""

from __future__ import annotations

import io
import os
import pickle
import runpy
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generate import generate_text, load_model_for_generation
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import checkpoint_content, load_checkpoint
from horovod_lm.training.optimizer import build_optimizer, build_scheduler
from horovod_lm.utils.config import config_from_dict
from tests.fuzz.conftest import PLAIN, cases, confined, damaged, edited, edits, succeeds_or_explains

CONFIG = config_from_dict(
    {
        "model": {"vocab_size": 257, "d_model": 4, "n_heads": 2, "n_layers": 1, "d_ff": 8,
                  "max_seq_len": 8, "pad_token_id": 256},
        "training": {"warmup_steps": 2},
    }
)  # fmt: skip


def parts() -> tuple[Any, ...]:
    """Return a model, its optimizer, scheduler and scaler, which have taken a step."""
    torch.manual_seed(0)
    model = TransformerLM(**CONFIG.model.model_dump())
    optimizer = build_optimizer(model, CONFIG.training)
    scheduler = build_scheduler(optimizer, CONFIG.training, total_steps=20)
    scaler = torch.amp.GradScaler("cpu")
    take_step(model, optimizer, scheduler, scaler)
    return model, optimizer, scheduler, scaler


def take_step(model: Any, optimizer: Any, scheduler: Any, scaler: Any) -> None:
    ids = torch.arange(16).view(2, 8)
    scaler.scale(model(ids, labels=ids)[1]).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scheduler.step()


GOOD = checkpoint_content(
    *parts(), epoch=0, step=1, global_step=1, loss=5.5, samples_seen=2, tokens=14,
    config=CONFIG.to_dict(), tokenizer=ByteTokenizer().to_json(),
)  # fmt: skip


COUNTS = ("epoch", "step", "global_step", "samples_seen", "tokens", "world_changes")


def saved(content: Any, as_zip: bool = True) -> bytes:
    """Return what torch writes."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    return file.getvalue()


def read_everywhere(place: Path, content: bytes) -> None:
    """Load a checkpoint as the user of every command does."""
    path = place / "fuzzed.pt"
    path.write_bytes(content)
    mine = parts()
    checkpoint = succeeds_or_explains(place, load_checkpoint, path, *mine)
    if checkpoint is not None:
        take_step(*mine)
        assert all(0 <= (checkpoint.get(count) or 0) < 2**63 for count in COUNTS)
    loaded = succeeds_or_explains(place, load_model_for_generation, path)
    if loaded is not None:
        model, tokenizer, _ = loaded
        [text] = generate_text(model, tokenizer, "a", 2, seed=0)
        assert text.startswith("a")


@cases(25, 700)
@given(content=damaged(saved(GOOD), [b"PK\x03\x04", b"PK\x05\x06"]))
def test_any_bytes(place, content):
    read_everywhere(place, content)


with zipfile.ZipFile(io.BytesIO(saved(GOOD))) as opened:
    RECORDS = {name: opened.read(name) for name in opened.namelist()}
PICKLED = next(name for name in RECORDS if name.endswith("data.pkl"))
OPCODES = [b"\x80\x05", b"cos\nsystem\n", b"X\x04\0\0\0true", b"\x85R", b"}", b"(", b".", b"h\x01"]
NAMES = ["../x", "/x", "archive/code/x.py", "archive/constants.pkl", "archive/.data/x", "x" * 99]


@st.composite
def zip_files(draw: st.DrawFn) -> bytes:
    """Zip files whose checksums are right, so that torch reads the damaged records."""
    records = dict(RECORDS)
    name = draw(st.sampled_from([*records, PICKLED, PICKLED, PICKLED]))
    if draw(st.integers(0, 3)):
        records[name] = draw(damaged(records[name], OPCODES))
    elif draw(st.booleans()):
        del records[name]
    else:
        records[draw(st.sampled_from(NAMES))] = records[name]
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_LZMA]))
    ) as zipped:
        for record, content in records.items():
            zipped.writestr(record, content)
    return file.getvalue()


@cases(25, 700)
@given(content=zip_files())
def test_any_records_of_a_zip_file(place, content):
    read_everywhere(place, content)


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_the_watch_sees_what_code_in_a_file_does(place):
    bomb = place / "bomb.pt"
    for call in (Call(os.system, "true"), Call(open, str(place.parent / "written"), "w")):
        torch.save(call, bomb)
        with pytest.raises(AssertionError, match="os.system|open"), confined(place):
            torch.load(bomb, weights_only=False)
    assert not (place.parent / "written").exists()


CODE = st.sampled_from([
    Call(os.system, "true"), Call(subprocess.run, "true"), Call(eval, "open('executed', 'w')"),
    Call(exec, "open('executed', 'w')"), Call(open, "executed", "w"), Call(os.mkdir, "executed"),
    Call(shutil.rmtree, "executed"), Call(__import__, "this"), Call(runpy.run_path, "executed"),
    Call(torch.load, "fuzzed.pt"), Path("x"), ValueError("x"), object(), slice(1), 1j, {1},
    bytearray(b"x"), range(3), torch.nn.Linear(1, 1),
])  # fmt: skip


@cases(25, 700)
@given(changes=edits(GOOD, CODE), how=st.sampled_from(["zip", "legacy", *range(6)]))
def test_code_anywhere(place, changes, how):
    content = edited(GOOD, changes)
    written = pickle.dumps(content, how) if isinstance(how, int) else saved(content, how == "zip")
    read_everywhere(place, written)


TENSORS = st.sampled_from([
    torch.zeros(0), torch.tensor(1.5), torch.zeros(257, 4), torch.zeros(257, 4, dtype=torch.int8),
    torch.full((257, 4), float("nan")), torch.zeros(257, 4, dtype=torch.complex64),
    torch.zeros(8, 4), torch.zeros(257, 4).to_sparse(), torch.zeros(257, 4, device="meta"),
    torch.zeros(1).expand(257, 4), torch.zeros(257, 4, dtype=torch.float16), torch.zeros(0, 4),
    torch.zeros(3, 3, dtype=torch.bool), torch.zeros(257, 4).to(torch.float8_e5m2),
])  # fmt: skip


@cases(30, 700)
@given(changes=edits(GOOD, PLAIN | TENSORS))
@example(changes=[(("config",), True)])
@example(changes=[(("config", "model"), torch.zeros(257, 4))])
@example(changes=[(("format",), torch.zeros(0))])
@example(changes=[(("samples_seen",), -5)])
@example(changes=[(("model", "token_embedding.weight"), torch.zeros(257, 4).to_sparse())])
@example(changes=[(("model", "token_embedding.weight"), torch.zeros(8, 4))])
@example(changes=[(("optimizer", "state", 0, "exp_avg"), torch.tensor(0.0))])  # wrote elsewhere
@example(changes=[(("optimizer", "param_groups", 0, "amsgrad"), True)])
def test_any_content(place, changes):
    read_everywhere(place, saved(edited(GOOD, changes)))
