"""Text to batches: corpora, tokenizers, token files, and loaders that shard batches over ranks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "get_dataloaders": "loaders",
    "load_preprocessed_data": "loaders",
    "ShardedBatchSampler": "loaders",
    "prepare_data": "prepare",
    "load_tokenizer": "tokenizers",
    "train_bpe": "tokenizers",
    "generate_stories": "synthetic.stories",
    "story_count": "synthetic.stories",
    "story_entropy": "synthetic.stories",
    "story_log_probability": "synthetic.stories",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a name on first use: only the loaders need torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
