"""Text to batches: corpora, tokenizers, token files, and loaders that share them out to ranks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "get_dataloaders": "loaders",
    "load_preprocessed_data": "loaders",
    "ShardedBatchSampler": "sampler",
    "TokenBlockDataset": "loaders",
    "prepare_data": "prepare",
    "load_tokenizer": "tokenizers",
    "train_bpe": "tokenizers",
    "generate_story": "stories",
    "generate_stories": "stories",
    "story_count": "stories",
    "story_entropy": "stories",
    "story_log_probability": "stories",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name from its module when it is first used: only loaders need torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
