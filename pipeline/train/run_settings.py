"""The settings that a run's numbers depend on; a run resumes only with the same ones.

Tested by tests/pipeline/train/test_trainer.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from pipeline.dataset.clip_index import Identity
from pipeline.dataset.shard_dataset import ShardDataset
from pipeline.errors import UserError
from pipeline.settings import flatten
from pipeline.train.config import TrainConfig
from pipeline.train.process_group import ProcessGroup
from pipeline.train.run_folder import RunFolder

_NUMERIC_IN_RUN = ("run.seed", "run.precision")  # the others in `run` change no numbers
_NOT_NUMERIC = ("data.loader_threads", "data.prefetch")


def numeric_settings(
    config: TrainConfig, data: ShardDataset, init_from: Path | None, folder: RunFolder
) -> dict[str, Any]:
    """Return everything that the numbers of a run depend on, by name.

    init_from: None: the one that the run in `folder` began from.
    """
    before = folder.settings() or {}
    start = before.get("init_from") if init_from is None else str(init_from.absolute())
    settings = {key: value for key, value in flatten(config).items() if _is_numeric(key)}
    identity = dataclasses.asdict(data.identity)
    clips = hashlib.blake2b("\0".join(data.index.clip_ids.to_pylist()).encode(), digest_size=8)
    clips.update(data.index.group.astype("<i8").tobytes())
    dataset = {f"dataset.{key}": value for key, value in identity.items()}
    dataset["dataset.clips"] = f"{len(data)} ({clips.hexdigest()})"
    return {**dataset, "init_from": start, **settings}


def _is_numeric(key: str) -> bool:
    if key.startswith("run."):
        return key in _NUMERIC_IN_RUN
    return key not in _NOT_NUMERIC


def require_suitable(config: TrainConfig, identity: Identity, group: ProcessGroup) -> None:
    """Check settings against the data and the number of workers.

    Raises: UserError: when they do not suit each other.
    """
    hop = config.model.hop_length
    if hop != identity.hop_length:
        raise UserError(
            f"the product of model.upsample_rates is {hop}, but the dataset has a frame every "
            f"{identity.hop_length} samples (f0.hop_length); make them equal"
        )
    parts = group.size * config.optimizer.accumulate
    if config.data.batch_size % parts:
        raise UserError(
            f"data.batch_size is {config.data.batch_size}; make it a multiple of workers x "
            f"optimizer.accumulate, {group.size} x {config.optimizer.accumulate}"
        )
