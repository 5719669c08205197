"""Datasets of shards: their schema, reading and writing, and examples for trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dataset.shard_dataset import ShardDataset

__all__ = ["ShardDataset"]


def __getattr__(name: str) -> Any:
    """Import `ShardDataset`, which needs torch, only when it is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.dataset.shard_dataset import ShardDataset

    return ShardDataset
