"""Stored by column, a model is the same model."""

from __future__ import annotations

import torch

from horovod_lm.models.layout import store_by_column


def test_only_the_layout_changes(make_model):
    rows = make_model().double().eval()
    columns = store_by_column(make_model().double().eval())
    for name, tensor in rows.state_dict().items():
        assert torch.equal(columns.state_dict()[name], tensor)
    assert columns.blocks[0].feed_forward.widen.weight.t().is_contiguous()
    assert columns.token_embedding.weight.t().is_contiguous()
    ids = torch.randint(1, 50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(columns(ids)[0], rows(ids)[0])
    text = rows.generate(ids, 20, 1.0, eos_token_id=None, seed=0)
    assert torch.equal(columns.generate(ids, 20, 1.0, eos_token_id=None, seed=0), text)


def test_it_is_saved_and_loaded_as_any_model(make_model, tmp_path):
    columns = store_by_column(make_model())
    torch.save(columns.state_dict(), tmp_path / "weights.pt")
    loaded = make_model(seed=1)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert loaded.token_embedding.weight.is_contiguous()
    assert torch.equal(loaded.token_embedding.weight, columns.token_embedding.weight)
