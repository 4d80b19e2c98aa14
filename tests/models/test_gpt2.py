"""With GPT-2's weights the model is GPT-2: logits, loss, gradients, padding, greedy text."""

from __future__ import annotations

import pytest
import torch

from horovod_lm.models.gpt2 import from_gpt2, gpt2_state_dict, load_gpt2
from horovod_lm.utils.errors import CheckpointError

transformers = pytest.importorskip("transformers")

# Three shapes drawn at random once: (seed, vocabulary, width, heads, layers, inner width, context).
SHAPES = [
    (1, 61, 48, 3, 2, None, 24),
    (2, 203, 40, 5, 4, 96, 33),
    (3, 118, 64, 8, 3, 100, 19),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"shape{shape[0]}")
def pair(request):
    """A `transformers` GPT-2 with random weights, and ours with the same."""
    seed, vocab_size, n_embd, n_head, n_layer, n_inner, n_positions = request.param
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=n_embd, n_head=n_head, n_layer=n_layer, n_inner=n_inner,
        n_positions=n_positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases too, and norms off 1: a wrong one must show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs, from_gpt2(theirs)


def random_ids(theirs, n_sequences=3):
    length = theirs.config.n_positions
    return torch.randint(1, theirs.config.vocab_size, (n_sequences, length))


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_loss_are_gpt2s(pair, side):
    theirs, ours = pair
    ids = random_ids(theirs)
    length = ids.shape[1]
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, length - 2) if side != "none" else ()):
        mask[row, slice(0, padding) if side == "left" else slice(length - padding, length)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    # Predictions from padding do not count; transformers leaves that to its caller.
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    expected = theirs(ids, attention_mask=mask, position_ids=positions, labels=labels)
    logits, loss = ours(ids, attention_mask=mask, labels=ids)
    is_token = mask.bool()
    torch.testing.assert_close(logits[is_token], expected.logits[is_token], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    _, chunked = ours(ids, attention_mask=mask, labels=ids, return_logits=False)
    torch.testing.assert_close(chunked, expected.loss, rtol=0, atol=1e-5)
    assert logits.isfinite().all()


def test_gradients_are_gpt2s(pair):
    theirs, ours = pair
    ids = random_ids(theirs)
    theirs.zero_grad()
    ours.zero_grad()
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids, return_logits=False)[1].backward()
    expected = gpt2_state_dict({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_greedy_text_is_gpt2s_padded_and_stopped(pair):
    theirs, ours = pair
    new_tokens = theirs.config.n_positions - 6
    ids = random_ids(theirs)[:, :6]
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    ids = ids * mask
    free = ours.generate(ids, new_tokens, 0.0, eos_token_id=None, attention_mask=mask)
    stop = free[0, 10].item()  # a token that really comes: the first row ends early
    for eos in (None, stop):
        expected = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=-1 if eos is None else eos, pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(ours.generate(ids, new_tokens, 0.0, eos_token_id=eos,
                                         attention_mask=mask), expected)  # fmt: skip


def small_gpt2(**settings):
    sizes = {"vocab_size": 20, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | settings))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("attn_pdrop", 0.3),
    ],
)
def test_settings_that_compute_something_else_are_refused_by_name(name, value):
    with pytest.raises(CheckpointError, match=f"this GPT-2 has {name}={value!r}; .* only "):
        from_gpt2(small_gpt2(**{name: value}))


def test_weights_that_cannot_be_loaded_are_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="h.0.rotary is not a parameter of GPT-2"):
        gpt2_state_dict({"transformer.h.0.rotary": torch.zeros(1)})
    untied = {"transformer.wte.weight": torch.zeros(2, 2), "lm_head.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="lm_head.weight differs from transformer.wte"):
        gpt2_state_dict(untied)
    resized = small_gpt2()
    resized.transformer.wpe = torch.nn.Embedding(4, 8)
    with pytest.raises(CheckpointError, match="weights do not fit its config: .*position_embed"):
        from_gpt2(resized)
    with pytest.raises(CheckpointError, match="cannot be loaded.*connect to the network") as error:
        load_gpt2(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_a_folder_with_weights_loads(tmp_path):
    theirs = small_gpt2()
    theirs.save_pretrained(tmp_path)
    loaded = load_gpt2(str(tmp_path)).state_dict()
    torch.testing.assert_close(loaded, from_gpt2(theirs).state_dict(), rtol=0, atol=0)
