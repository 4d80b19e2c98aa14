"""What the tests of the data share: a small configuration in a project folder of its own."""

from __future__ import annotations

import pytest

from horovod_lm.utils.config import config_from_dict


@pytest.fixture
def make_config(tmp_path):
    """Return a function that makes a configuration; its keywords are settings of section `data`."""

    def make(vocab_size=400, max_seq_len=16, seed=7, batch=4, **data):
        settings = {
            "model": {
                "vocab_size": vocab_size, "max_seq_len": max_seq_len, "pad_token_id": None,
                "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32,
            },
            "training": {"per_gpu_batch_size": batch, "gradient_accumulation_steps": 1},
            "data": {
                "source": "stories", "num_stories": 100, "tokenizer": "byte",
                "data_dir": "prepared", **data,
            },
            "seed": seed,
        }  # fmt: skip
        return config_from_dict(settings, project_root=tmp_path)

    return make
