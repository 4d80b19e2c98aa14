"""Every text can be shown: visible, without effect on the page, nothing lost."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer, train_bpe
from horovod_lm.jupyter.widgets.visible import visible, visible_token


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Once upon a time", "Once upon a time"),
        ("<b>&amp;", "<b>&amp;"),
        ("a\x1b[2J\x00\x7f", "a␛[2J␀␡"),
        ("one\ntwo\tthree\r", "one↵\ntwo⇥\tthree␍"),
        ("\u202eabc\u2066", "⟨U+202E⟩abc⟨U+2066⟩"),
        ("\u00a0\u200b\ufeff\x9b", "⟨U+00A0⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+009B⟩"),
        ("\u0301e", "◌\u0301e"),
        ("e\u0301", "e\u0301"),
        ("🙂 שלום 日本", "🙂 שלום 日本"),
        ("a\ud800b", "a⟨U+D800⟩b"),
        ("", ""),
    ],
)
def test_text_is_shown_as_itself(text, shown):
    assert visible(text) == shown


@settings(deadline=None)
@given(st.text())
def test_no_control_character_is_ever_shown_raw(text):
    for character in visible(text):
        category = unicodedata.category(character)
        assert category not in ("Cf", "Cs", "Cn", "Co", "Zl", "Zp")
        assert category != "Cc" or character in "\n\t"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["שלום 🙂🙂🙂"], 290)], ids=repr)
def test_tokens_are_shown_one_by_one(tokenizer):
    shown = [visible_token(tokenizer, token) for token in tokenizer.encode("a\x1b€")]
    assert shown == ["a", "␛", "⟨E2⟩", "⟨82⟩", "⟨AC⟩"]
    assert visible_token(tokenizer, tokenizer.eot_id) == "<|endoftext|>"
    assert visible_token(tokenizer, 99_999) == "\N{REPLACEMENT CHARACTER}"
