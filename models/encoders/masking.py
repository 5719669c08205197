"""SpecAugment on frames, for fine-tuning of a network.

Park et al. (2019) as in wav2vec 2.0: spans of frames are replaced by one learnt vector, spans of
features by zero. Implemented here so that training does not need transformers; the same seed masks
the same frames as there.

Tested by tests/models/encoders/test_fine_tuning.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def compute_mask_indices(
    shape: tuple[int, int],
    probability: float,
    length: int,
    *,
    rng: np.random.RandomState,
    lengths: Sequence[int] | None = None,
    min_masks: int = 0,
) -> NDArray[np.bool_]:
    """Draw a mask of `shape` (rows, positions), True where masked. Spans of `length` may overlap.

    probability: upper bound of the masked share. lengths: positions of each row without padding;
    None: all. min_masks: lowest number of spans in a row, where they fit. A row too short for one
    span has its last position masked, which is padding.

    rng: replaces numpy's global state in transformers, so `RandomState(seed)` here equals
    `np.random.seed(seed)` there: one number per call (it rounds the number of spans up or down),
    then one permutation per row.

    Raises: ValueError: when a span has no positions or more than a row.
    """
    n_rows, n = shape
    if not 1 <= length <= n:
        raise ValueError(f"a masked span of {length} does not fit into {n} positions")
    rounding = rng.rand(1).item()

    def spans(valid: int) -> int:
        count = max(int(probability * valid / length + rounding), min_masks)
        if count * length > n:
            count = n // length
        return min(count, max(valid - length + 1, 0))

    mask = np.zeros(shape, dtype=bool)
    if spans(n) == 0:
        return mask
    for row, valid in zip(mask, lengths if lengths is not None else [n] * n_rows, strict=True):
        starts = rng.choice(max(valid - length + 1, 0), spans(valid), replace=False)
        if len(starts) == 0:
            row[-1] = True
        row[starts[:, None] + np.arange(length)] = True
    return mask


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """Settings of the masks; see `compute_mask_indices`. Lengths in frames and in features."""

    time_probability: float = 0.05
    time_length: int = 10
    time_min_masks: int = 2
    feature_probability: float = 0.0
    feature_length: int = 10
    feature_min_masks: int = 0


class SpecAugment(nn.Module):
    """Masking of frames and features in training; the identity in evaluation.

    Used between a network's projection and its position convolution: `Wav2Vec2.masking`.

    embedding: (H,), replaces a masked frame; checkpoints call it `mask_emb` (fairseq) and
    `masked_spec_embed` (transformers).
    """

    def __init__(self, config: SpecAugmentConfig, width: int, rng: np.random.RandomState) -> None:
        super().__init__()
        self.config, self.rng = config, rng
        self.embedding = nn.Parameter(torch.empty(width).uniform_())

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> Tensor:
        """Mask x (B, F, H), given the frames of each clip."""
        cfg = self.config
        if not self.training:
            return x
        if cfg.time_probability > 0:
            mask = compute_mask_indices(
                (x.shape[0], x.shape[1]),
                cfg.time_probability,
                cfg.time_length,
                rng=self.rng,
                lengths=num_frames,
                min_masks=cfg.time_min_masks,
            )
            x = torch.where(_on(x, mask).unsqueeze(2), self.embedding.to(x), x)
        if cfg.feature_probability > 0:
            mask = compute_mask_indices(
                (x.shape[0], x.shape[2]),
                cfg.feature_probability,
                cfg.feature_length,
                rng=self.rng,
                min_masks=cfg.feature_min_masks,
            )
            x = x.masked_fill(_on(x, mask).unsqueeze(1), 0)
        return x


def _on(x: Tensor, mask: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(mask).to(x.device)
