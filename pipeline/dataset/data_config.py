"""Settings of training data, apart from the examples so that reading them does not import torch.

Tested by tests/pipeline/train/test_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.synthesizer.config import require_at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of examples and batches.

    encoder: which units to use; None where the dataset has those of one encoder.
    split: of the dataset, as its manifest names it.
    validation: share of the songs that is held out for validation; whole songs only.
    max_frames: of an example; a longer clip is cropped, in each epoch at another place.
    expand: how units are expanded to frames; so-vits-svc's `unit_interpolate_mode`.
    volume_augment: change the volume of clips at random, down to a tenth.
    key_shift: semitones, the most that clips are shifted up or down, with their formants.
    """

    encoder: str | None = None
    split: str = "train"
    validation: float = 0.02
    batch_size: int = 6  # clips a step, for all workers together
    max_frames: int = 790
    min_frames: int = 30  # shorter clips are left out, and counted
    expand: Literal["nearest", "left"] = "nearest"
    volume_augment: bool = False
    key_shift: float = 0.0
    shuffle_groups: int = 16  # row groups mixed at a time; each worker keeps their clips
    loader_threads: int = 2  # of each worker
    prefetch: int = 4  # batches

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}; it must lie in 0 to 1")
        for name in ("batch_size", "max_frames", "shuffle_groups", "loader_threads", "prefetch"):
            require_at_least(1, f"data.{name}", getattr(self, name))
        if self.max_frames < self.min_frames:
            raise ValueError(
                f"data.max_frames is {self.max_frames}; it must be at least data.min_frames, "
                f"{self.min_frames}"
            )
        if not 0 <= self.key_shift <= 12:
            raise ValueError(f"data.key_shift is {self.key_shift}; it must lie in 0 to 12")
