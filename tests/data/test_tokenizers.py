"""Tokenizers: exact round trips of any text, and end-of-text in no encoding."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from horovod_lm.data.synthetic.stories import generate_stories
from horovod_lm.data.tokenizers import (
    END_OF_TEXT,
    UNKNOWN,
    ByteTokenizer,
    GPT2Tokenizer,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)
from horovod_lm.utils.errors import DataError

TOKENIZERS = {
    "bpe": train_bpe([*generate_stories(200, seed=0), "def f(x):\n    return x\n" * 50], 500),
    "byte": ByteTokenizer(),
}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@settings(deadline=None)
@given(text=ANY_TEXT)
@example(text="\N{FAMILY}\N{ZERO WIDTH JOINER}👩🏽‍🚀 naïve \x00\x01\x7f\r\n\t  trailing  ")
@example(text=END_OF_TEXT)
@example(text=f"one{END_OF_TEXT}{END_OF_TEXT} two")
@example(text="")
@example(text="".join(map(chr, range(0x800))))  # all characters of one and two bytes
@any_tokenizer
def test_any_text_is_decoded_exactly_and_contains_no_end_of_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    special = [tokenizer.eot_id, tokenizer.vocab_size, -1]
    assert tokenizer.decode([*ids, *special]) == f"{text}{END_OF_TEXT}{UNKNOWN}{UNKNOWN}"


@any_tokenizer
def test_json_restores_the_same_tokenizer_without_any_file(tokenizer, tmp_path):
    text = "Once upon a time, naïve 🦉"
    plain, windows = tmp_path / "tokenizer.json", tmp_path / "windows.json"
    plain.write_text(tokenizer.to_json(), encoding="utf-8")
    windows.write_text(tokenizer.to_json(), encoding="utf-8-sig")  # with a byte-order mark
    for source in (tokenizer.to_json(), plain, str(plain), windows):
        restored = load_tokenizer(source)
        assert restored.eot_id == tokenizer.eot_id
        assert restored.encode(text) == tokenizer.encode(text)
        assert restored.to_json() == tokenizer.to_json()


def test_a_bpe_has_the_requested_size_if_there_are_pairs_and_its_training_is_deterministic():
    small = train_bpe(["the owl and the owl and the owl"], 10_000)
    assert 257 < small.vocab_size < 300
    assert small.eot_id == small.vocab_size - 1
    assert len(small.encode(" owl")) == 1
    assert train_bpe(generate_stories(200, seed=0), 300).vocab_size == 300
    with pytest.raises(DataError, match="at least 257 tokens.*but model.vocab_size is 256"):
        train_bpe(["text"], 256)
    first, second = (train_bpe(generate_stories(300, 1), 500).to_json() for _ in range(2))
    assert first == second


def test_without_a_network_gpt2_is_a_sentence_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server
    started = time.monotonic()
    with pytest.raises(DataError, match="cannot be downloaded.*data.tokenizer=bpe") as caught:
        make_tokenizer("gpt2")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60


def test_gpt2_if_its_file_is_available():
    try:
        gpt2 = GPT2Tokenizer()
    except DataError as error:
        pytest.skip(str(error))
    assert gpt2.encode("Hello world") == [15496, 995]
    ids = gpt2.encode(f"🦉 {END_OF_TEXT}")
    assert gpt2.eot_id not in ids
    assert gpt2.decode([*ids, gpt2.eot_id, 60_000]) == f"🦉 {END_OF_TEXT * 2}{UNKNOWN}"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{", "not a tokenizer"),
        ('{"name": "bpe", "tokenizer": {"version": "1.0"}}', "not a tokenizer"),
        ('{"name": "word"}', "unknown tokenizer 'word': use bpe, byte or gpt2"),
        ("missing.json", "missing.json cannot be read: No such file"),
    ],
)
def test_what_is_not_a_tokenizer_is_a_sentence(source, sentence):
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(source)
