"""Any tokenizer and token file, and any record of a run: it is read, or one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from horovod_lm.data import get_dataloaders, load_tokenizer, prepare_data
from horovod_lm.data.tokenizers import train_bpe
from horovod_lm.jupyter.widgets.dashboard_view import RunView
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.metrics import MetricsRecorder, read_metrics
from horovod_lm.training.run_dir import RunFolder, newest_run
from horovod_lm.utils.config import config_from_dict
from tests.fuzz.conftest import REMOVED, cases, damaged, edited, edits, succeeds_or_explains

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.just("two three")
TOKENIZER = json.loads(train_bpe(["one two three two one\n" * 9], 262).to_json())
VOCABULARY = ("tokenizer", "model", "vocab")
SIZES = {"vocab_size": 257, "d_model": 4, "n_heads": 1, "n_layers": 1, "d_ff": 4,
         "max_seq_len": 16, "pad_token_id": None}  # fmt: skip
DATA = {"source": "stories", "num_stories": 8, "tokenizer": "byte", "data_dir": "data"}


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@cases(60, 800)
@given(
    content=edits(TOKENIZER).map(lambda changes: as_json(edited(TOKENIZER, changes)))
    | damaged(as_json(TOKENIZER)),
    text=ANY_TEXT,
)
@example(content=as_json(edited(TOKENIZER, [((*VOCABULARY, "e"), REMOVED)])), text="e")
@example(content=as_json(edited(TOKENIZER, [((*VOCABULARY, "Ġtwo"), REMOVED)])), text=" two")
@example(content=as_json(edited(TOKENIZER, [((*VOCABULARY, "Ġtwo"), 999)])), text=" two")
@example(content=b"\xed\xa0\x80", text="")
@example(content=b'{"name": []}', text="")
def test_any_tokenizer(place, content, text):
    """A tokenizer that can be loaded encodes every text exactly."""
    file = place / "tokenizer.json"
    file.write_bytes(content)
    tokenizer = succeeds_or_explains(place, load_tokenizer, file)
    if tokenizer is not None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.eot_id for token in ids)
        assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)
        assert load_tokenizer(tokenizer.to_json()).encode(text) == ids


@pytest.fixture(scope="module")
def prepared(place):
    """A configuration, and its prepared files."""
    config = config_from_dict({"model": SIZES, "data": DATA}, place)
    prepare_data(config)
    names = ("metadata.json", "train.bin", "val.bin")
    return config, {name: (place / "data" / name).read_bytes() for name in names}


@cases(40, 800)
@given(data=st.data(), name=st.sampled_from(["metadata.json", "train.bin", "val.bin", "edited"]))
def test_any_token_file(place, prepared, data, name):
    """What can be loaded fits the model, and is prepared again otherwise."""
    config, files = prepared
    if name == "edited":
        metadata, name = json.loads(files["metadata.json"]), "metadata.json"
        content = as_json(edited(metadata, data.draw(edits(metadata))))
    else:
        content = data.draw(damaged(files[name], [b"\xff\xff", b"\x01\x01"]))
    for each, good in files.items():
        (place / "data" / each).write_bytes(content if each == name else good)
    model = TransformerLM(**config.model.model_dump())

    def train() -> None:
        for loader in get_dataloaders(config, 0, 1):
            for batch in loader:
                model(**batch)

    succeeds_or_explains(place / "data", train)
    succeeds_or_explains(place / "data", prepare_data, config)


@pytest.fixture(scope="module")
def run_files(place):
    """The records of a run, by file."""
    config = config_from_dict({}, place)
    run = RunFolder.of(config, "good")
    run.describe(config, 1, "cpu")
    recorder = MetricsRecorder(run.run_dir, run.log_dir, run.tensorboard_dir)
    recorder.event("start", pid=1, step=0, total_steps=3)
    for step in (1, 2, 3):
        values = {"epoch": 0, "step": step, "tokens": 64, "loss": 2.5, "accuracy": 0.5}
        recorder.record("train", **values, tokens_per_second=5.0, seconds_data=0.1)
        recorder.record("validation", **values)
    recorder.close()
    names = ("metrics.csv", "logs/rank0.jsonl", "run.json", "config.yaml")
    return {name: (run.run_dir / name).read_bytes() for name in names}


PIECES = [b"\0", b"\n", b",", b'"', b"\r", b"nan", b"1e999", b"\xff", b"{}", b"[]", b"9" * 5000]


@pytest.mark.filterwarnings("ignore:.*damaged lines")
@cases(40, 800)
@given(data=st.data(), name=st.sampled_from(["metrics.csv", "logs/rank0.jsonl", "run.json"]))
def test_any_record_of_a_run(place, run_files, data, name):
    """A damaged record ends neither a dashboard nor the run that is resumed."""
    if name != "metrics.csv" and data.draw(st.booleans()):
        events = [json.loads(line) for line in run_files["logs/rank0.jsonl"].splitlines()]
        events = [json.loads(run_files[name])] if name == "run.json" else events
        content = b"\n".join(map(as_json, edited(events, data.draw(edits(events))))) + b"\n"
    else:
        content = data.draw(damaged(run_files[name], PIECES))
    config = config_from_dict({}, place)
    run = RunFolder.of(config, "fuzzed")
    run.log_dir.mkdir(parents=True, exist_ok=True)
    for each, good in run_files.items():
        (run.run_dir / each).write_bytes(content if each == name else good)

    def look() -> None:
        view = RunView(run.run_dir)
        view.update()
        view.headline(), view.rank_rows(), view.describe_end(), view.is_running, view.is_starting

    def resume() -> None:
        run.describe(config, 1, "cpu")
        MetricsRecorder(run.run_dir, run.log_dir, run.run_dir / "events", resume_step=2).close()

    assert newest_run(config) in ("fuzzed", "good")
    for use in (look, lambda: read_metrics(run.run_dir), resume):
        succeeds_or_explains(run.run_dir, use)
    for file in (run.run_dir / "events").iterdir():
        file.unlink()
