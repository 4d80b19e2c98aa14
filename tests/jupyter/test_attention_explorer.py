"""The attention explorer without a browser: the numbers, the choice of heads, and the errors."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.jupyter.widgets.attention_explorer import (
    AttentionExplorer,
    AttentionMap,
    read_attention,
    thumbnails,
)
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.errors import DataError

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(257, 32, 4, 3, 64, 64, dropout=0.5, pad_token_id=256)


@pytest.fixture
def explorer(model):
    made = AttentionExplorer(model, TOKENIZER, "Once upon")
    yield made
    made.close()


def read(explorer: AttentionExplorer, sentence: str) -> None:
    """Type a sentence, click Show, and let the event loop work until it has been read."""

    async def work() -> None:
        explorer.sentence.value = sentence
        explorer.read.click()
        assert explorer.read.disabled
        await explorer._task

    asyncio.run(work())
    assert not explorer.read.disabled


def shown_weights(explorer: AttentionExplorer) -> np.ndarray:
    size = len(explorer.view.tokens)
    return np.frombuffer(explorer.view.weights, np.float32).reshape(size, size)


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=15))
def test_the_weights_are_the_model_s_own_over_the_text_as_in_training(model, text):
    attention = read_attention(model.train(), TOKENIZER, text)
    assert model.training
    ids = torch.tensor([[256, *text.encode()]])
    expected = model.eval().attention_weights(ids)[:, 0]
    assert torch.equal(attention.weights, expected)
    size = ids.shape[1]
    assert attention.weights.shape == (3, 4, size, size)
    torch.testing.assert_close(attention.weights.sum(-1), torch.ones(3, 4, size))
    assert attention.tokens[0] == "<|endoftext|>" and len(attention.tokens) == size
    bits = attention.entropy_bits
    assert 0 <= bits.min() <= bits.max() <= math.log2(size) + 1e-6


def test_entropy_is_in_bits():
    heads = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    bits = AttentionMap([], heads[None, :, None, :].expand(1, 3, 4, 4)).entropy_bits
    assert bits.tolist() == [pytest.approx([0, 1, 2])]


def test_a_text_fills_the_context_and_no_more(model):
    assert len(read_attention(model, TOKENIZER, "x" * 63).tokens) == 64
    with pytest.raises(DataError, match="has 65 tokens .* is 64 tokens: shorten it"):
        read_attention(model, TOKENIZER, "x" * 64)
    with pytest.raises(DataError, match="unpaired surrogate"):
        read_attention(model, TOKENIZER, "a\ud800")


def test_a_thumbnail_keeps_every_large_weight():
    weights = torch.zeros(1, 2, 100, 100)
    weights[0, 1, 57, 3] = 0.8
    small = thumbnails(weights)
    assert small.shape == (1, 2, 32, 32) and small.dtype == torch.uint8
    assert small[0, 0].max() == 0 and small[0, 1, 18, 0] == 204
    assert thumbnails(weights[..., :7, :7]).shape == (1, 2, 7, 7)


def test_it_shows_the_sentence_at_once_and_all_heads_as_a_figure(explorer, model):
    attention = read_attention(model, TOKENIZER, "Once upon")
    assert explorer.view.tokens == attention.tokens and explorer.view.grid == [3, 4, 10]
    assert np.array_equal(shown_weights(explorer), attention.weights[0, 0].numpy())
    assert len(explorer.view.thumbnails) == 3 * 4 * 10 * 10
    assert explorer.view.entropy_bits == attention.entropy_bits.tolist()
    bits = attention.entropy_bits[0, 0].item()
    assert f"layer 1, head 1: mean entropy {bits:.3f} bits" in explorer.message.value
    panel = explorer.plot_all().axes[8]
    assert panel.get_title() == f"3.1: {attention.entropy_bits[2, 0].item():.2f} bit"
    np.testing.assert_allclose(panel.images[0].get_array(), attention.weights[2, 0], rtol=1e-6)
    assert repr(explorer) == "attention explorer: attention of 3 layers with 4 heads over 10 tokens"


def test_a_head_is_chosen_by_its_picture_and_stays_for_the_next_sentence(explorer):
    weights = explorer.attention.weights
    explorer.view._handle_custom_msg([1, 3], [])
    assert (explorer.view.layer, explorer.view.head) == (1, 3)
    assert np.array_equal(shown_weights(explorer), weights[1, 3].numpy())
    assert "layer 2, head 4" in explorer.message.value
    read(explorer, "Then")
    assert np.array_equal(shown_weights(explorer), explorer.attention.weights[1, 3].numpy())


def test_errors_are_shown_and_the_last_sentence_stays(explorer, monkeypatch):
    before = explorer.view.tokens
    read(explorer, "x" * 64)
    assert "DataError: the text has 65 tokens" in explorer.message.value
    assert explorer.view.tokens == before
    monkeypatch.setattr(explorer._model, "attention_weights", lambda *_: 1 / 0)
    read(explorer, "fine")
    assert "ZeroDivisionError" in explorer.message.value
    explorer.view._handle_custom_msg([7, 0], [])
    assert "role='alert'" in explorer.message.value


def test_a_closed_explorer_leaves_no_task(explorer):
    async def work() -> None:
        explorer.read.click()
        explorer.close()
        await asyncio.wait([explorer._task], timeout=10)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())
