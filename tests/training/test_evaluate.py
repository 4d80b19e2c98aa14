"""Evaluation: additive sums, perplexity = exp(mean loss), log-probabilities of texts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.evaluate import Evaluation, evaluate, perplexity, score_texts


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(257, 32, 4, 2, 64, 24, dropout=0.2, pad_token_id=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double()


def batches(*sizes: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 257, (size, length), generator=generator) for size in sizes]
    return [{"input_ids": part, "labels": part} for part in ids]


def test_sums_are_those_of_all_tokens_at_once(model):
    loader = batches(3, 1, 0, 2)
    loader[0]["labels"] = loader[0]["labels"].clone()
    loader[0]["labels"][1, 4:] = -100
    loader[1]["attention_mask"] = torch.tensor([[0] * 5 + [1] * 7])
    result = evaluate(model, loader)
    nats, tokens, correct = 0.0, 0, 0
    model.eval()
    for batch in loader[:2] + loader[3:]:
        with torch.no_grad():
            logits, _ = model(batch["input_ids"], batch.get("attention_mask"))
        targets = batch["labels"][:, 1:].clone()
        if "attention_mask" in batch:
            targets[:, :5] = -100
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
        nats += losses.sum().item()
        tokens += (targets != -100).sum().item()
        correct += (logits[:, :-1].argmax(-1) == targets).sum().item()
    assert (result.tokens, result.correct) == (tokens, correct)
    assert result.nats == pytest.approx(nats, rel=1e-12)
    assert tokens == 3 * 11 - 8 + 6 + 2 * 11


def test_perplexity_is_exp_of_the_mean_over_tokens():
    # Fault 7: over batches of loss 1 and 3, mean(exp(loss)) is 11.4; the perplexity is exp(2).
    both = Evaluation(nats=10.0 + 30.0, tokens=20, correct=5)
    assert both.loss == 2.0 and both.accuracy == 0.25
    assert both.perplexity == pytest.approx(math.exp(2)) == perplexity(2.0)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(Evaluation().loss) and math.isnan(Evaluation().perplexity)


def test_dropout_is_off_without_gradients_and_the_mode_is_restored(model):
    loader = batches(2)
    model.train()
    assert evaluate(model, loader) == evaluate(model, loader)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    evaluate(model, loader)
    assert not model.training


def test_max_batches_and_autocast(model):
    loader = batches(2, 2, 2)
    assert evaluate(model, loader, max_batches=2) == evaluate(model, loader[:2])
    assert evaluate(model, loader, max_batches=0) == Evaluation()
    single = TransformerLM(257, 32, 4, 2, 64, 24)
    single.load_state_dict(model.state_dict())
    exact = evaluate(single, loader)
    rough = evaluate(single, loader, autocast=torch.autocast("cpu", torch.bfloat16))
    assert rough != exact and rough.loss == pytest.approx(exact.loss, rel=0.01)


def nats_by_hand(model, ids: list[int]) -> float:
    model.eval()
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[:-1]]))
    return F.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="sum").item()


def test_texts_are_scored_between_end_of_text_tokens(model):
    tokenizer = ByteTokenizer()
    texts = ["a longer one, 🙂", "", "short", "exactly 23 bytes of text"[:23], "short"]
    scores = score_texts(model, tokenizer, texts)
    expected = [nats_by_hand(model, [256, *text.encode(), 256]) for text in texts]
    assert scores == pytest.approx(expected, rel=1e-9)
    assert score_texts(model, tokenizer, []) == []


def test_a_long_text_is_scored_window_by_window(model):
    text = "x" * 40
    ids = [256, *text.encode(), 256]
    expected = nats_by_hand(model, ids[:25])
    for start, end, first in ((12, 36, 24), (17, 41, 36)):
        window = torch.tensor([ids[start:end]])
        with torch.no_grad():
            logits = model(window)[0][0, first - start :]
        targets = torch.tensor(ids[first + 1 : end + 1])
        expected += F.cross_entropy(logits, targets, reduction="sum").item()
    assert score_texts(model, ByteTokenizer(), [text]) == pytest.approx([expected], rel=1e-9)
