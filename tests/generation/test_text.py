"""Generation: loading, whole texts, streaming, and the command line as users run it."""

from __future__ import annotations

import copy
import os
import signal
import sys

import pexpect
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer, train_bpe
from horovod_lm.generate import generate_text, load_model_for_generation, main, stream_text
from horovod_lm.generation.load import find_checkpoint
from horovod_lm.generation.text import decode_stream
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import save_checkpoint
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.config import GenerationConfig, config_from_dict, save_config
from horovod_lm.utils.errors import CheckpointError, ConfigError, DataError

MODEL = {"vocab_size": 257, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 64,
         "max_seq_len": 48, "pad_token_id": 256}  # fmt: skip
CONFIG = config_from_dict(
    {"model": MODEL, "generation": {"max_new_tokens": 12, "seed": 1, "temperature": 1.0}}
)
SENTENCE = "Once upon a time, ünï €uro 🙂 שלום\n"
BPE = train_bpe([SENTENCE * 3, "日本日本 🙂🙂🙃"], 300)


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(**CONFIG.model.model_dump())
    # Overfit to one sentence with characters of one to four bytes, and to its end.
    ids = torch.tensor([[256, *SENTENCE.encode(), 256]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(ids, labels=ids, return_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def save(model, folder, name="best_model.pt", config=CONFIG, **changes):
    tokenizer = ByteTokenizer().to_json()
    content = {"config": config.to_dict(), "tokenizer": tokenizer} | changes
    return save_checkpoint(model, None, 0, 5, 1.0, folder, name, **content)


@pytest.fixture(scope="module")
def run_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(model, folder / "checkpoints")
    return folder


def test_a_checkpoint_alone_is_enough(model, run_folder):
    for part in ("", "checkpoints", "checkpoints/best_model.pt"):
        loaded, tokenizer, config = load_model_for_generation(run_folder / part)
        assert config.to_dict() == CONFIG.to_dict() and tokenizer.name == "byte"
        assert not loaded.training
        torch.testing.assert_close(loaded.cpu().state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_weights_determine_the_sizes_not_the_configuration(model, run_folder, tmp_path):
    other = save_config(config_from_dict({"generation": {"top_k": 3}}), tmp_path / "big.yaml")
    loaded, _, config = load_model_for_generation(run_folder, other)
    assert config.model == CONFIG.model and loaded.num_parameters() < 100_000
    assert config.generation.top_k == 3
    # The trained tokenizer may have fewer tokens than the configuration allows.
    save(model, tmp_path, config=config_from_dict({"model": MODEL | {"vocab_size": 999}}))
    assert load_model_for_generation(tmp_path)[2].model.vocab_size == 257


def test_without_a_best_model_the_newest_is_loaded(model, tmp_path):
    for step in (3, 20, 7):
        save(model, tmp_path / "checkpoints", f"checkpoint_epoch0_step{step}.pt")
    assert find_checkpoint(tmp_path).name == "checkpoint_epoch0_step20.pt"


def test_what_cannot_be_loaded_is_one_sentence(model, tmp_path):
    config = CONFIG.with_overrides({"data.data_dir": str(tmp_path)})
    bare = save_checkpoint(model, None, 0, 0, 1.0, tmp_path, "bare.pt")
    mute = save(model, tmp_path, "mute.pt", config, tokenizer=None)
    for path, sentence in (
        (tmp_path, "neither .* contains a checkpoint"),
        (tmp_path / "nothing.pt", "no checkpoint"),
        (bare, "contains no configuration"),
        (mute, "contains no tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load_model_for_generation(path)
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    assert load_model_for_generation(mute)[1].name == "byte"


def test_matrices_are_loaded_in_column_major_order(model, run_folder):
    loaded, _, _ = load_model_for_generation(run_folder)
    for name, tensor in loaded.state_dict().items():
        if tensor.ndim == 2 and name != "position_embedding.weight":
            assert tensor.t().is_contiguous() and not tensor.is_contiguous(), name
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded.cpu()(ids)[0], model(ids)[0])


def test_bfloat16_rounds_the_weights_and_nothing_else(model, run_folder, tmp_path):
    loaded, tokenizer, _ = load_model_for_generation(run_folder, dtype="bfloat16")
    rounded = {name: part.bfloat16() for name, part in model.state_dict().items()}
    torch.testing.assert_close(loaded.cpu().state_dict(), rounded, rtol=0, atol=0)
    assert generate_text(loaded, tokenizer, "Once", 40, seed=0)[0].startswith("Once")
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        logits, exact = loaded(ids)[0].float(), model(ids)[0]
    assert 0 < (logits - exact).norm() / exact.norm() < 0.02
    with pytest.raises(ConfigError, match="dtype must be float32 or bfloat16, got 'half'"):
        load_model_for_generation(run_folder, dtype="half")


@pytest.mark.parametrize("prompt", ["", "Once upon", SENTENCE])
def test_a_memorized_text_is_continued_to_its_end(model, prompt):
    tokenizer = ByteTokenizer()
    assert generate_text(model, tokenizer, prompt, 60, temperature=0.0) == [SENTENCE]
    how = GenerationConfig(max_new_tokens=60, temperature=0.0)
    pieces = list(stream_text(model, tokenizer, prompt, how))
    assert pieces == list(SENTENCE.removeprefix(prompt))  # character by character


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=30), seed=st.integers(), temperature=st.sampled_from([0, 0.7, 3.0]))
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_streamed_text_is_the_text_for_any_prompt(model, prompt, seed, temperature):
    how = GenerationConfig(
        max_new_tokens=25, temperature=temperature, top_k=0, top_p=1.0, seed=seed
    )
    tokenizer = ByteTokenizer()
    text = generate_text(model, tokenizer, prompt, **how.model_dump())[0]
    assert prompt + "".join(stream_text(model, tokenizer, prompt, how)) == text


def test_invalid_arguments_are_one_sentence(model):
    with pytest.raises(ConfigError, match="'abacus' is no device"):
        generate_text(model, ByteTokenizer(), "x", device="abacus")
    with pytest.raises(DataError, match="unpaired surrogate"):
        generate_text(model, ByteTokenizer(), "a\ud800b")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=24) | st.text(max_size=12).map(str.encode))
def test_a_decoded_stream_loses_nothing_and_yields_whole_characters(data):
    assert "".join(decode_stream(ByteTokenizer(), data)) == data.decode(errors="replace")
    ids = BPE.encode(data.decode(errors="ignore"))
    assert "".join(decode_stream(BPE, ids)) == data.decode(errors="ignore")


def test_characters_are_yielded_as_soon_as_they_are_complete():
    tokens = iter("a€b".encode())
    pieces = decode_stream(ByteTokenizer(), tokens)
    assert next(pieces) == "a" and next(pieces) == "€"
    assert list(tokens) == [ord("b")]  # not one byte more was taken to show the euro sign


def test_the_command_line_prints_the_text(run_folder, capsys):
    arguments = ["--checkpoint", str(run_folder), "--prompt", "Once", "--max-new-tokens", "60",
                 "--temperature", "0", "--num-samples", "2"]  # fmt: skip
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{SENTENCE}\n\n{SENTENCE}\n"


def test_a_mistake_is_one_sentence_and_exit_code_2(run_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_cli(main, ["--checkpoint", str(run_folder), "--prompt", "x", "--top-p", "3"])
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert "top_p" in printed.err and printed.out == ""


def test_a_conversation_in_a_terminal_survives_ctrl_c_in_a_text_and_ends_on_ctrl_d(model, tmp_path):
    endless = copy.deepcopy(model)
    with torch.no_grad():
        endless.token_embedding.weight[256] = 0.0  # it never samples end-of-text
    save(endless, tmp_path)
    arguments = ["-m", "horovod_lm.generate", "--checkpoint", str(tmp_path),
                 "--max-new-tokens", "1000000", "--temperature", "0"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}
    with pexpect.spawn(sys.executable, arguments, timeout=100, env=env) as terminal:
        terminal.expect_exact("> ")
        terminal.sendline("Once upon")
        terminal.expect_exact("Once upon")  # echoed by the terminal
        terminal.expect_exact("Once upon")  # by the model, which would write for hours
        terminal.kill(signal.SIGINT)
        terminal.expect_exact("[stopped]")
        terminal.expect_exact("> ")
        terminal.sendeof()
        terminal.expect_exact(pexpect.EOF)
        assert terminal.wait() == 0
