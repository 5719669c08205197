"""SpecAugment on frames: what a network must guess when it is fine-tuned.

Park et al. (2019) as wav2vec 2.0 has it: spans of frames give way to one learnt vector, spans of
features to zero. Ours rather than transformers', so that training needs no transformers; the same
seed masks the same frames.
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
    """True where masked: bool `shape`, (rows, positions). Spans of `length` positions may overlap.

    probability: upper bound of the share masked. lengths: positions that each row has, the rest is
    padding; None: all. min_masks: spans a row has at least, where they fit. A row too short for one
    span has its last position masked, which is padding.

    rng: draws what transformers draws from numpy's global state, so `RandomState(seed)` gives what
    `np.random.seed(seed)` gives there: one number for the call (it rounds the number of spans up or
    down), then one permutation for each row.

    Raises ValueError for a span of no positions, or of more than there are.
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
    """How much is masked; see `compute_mask_indices`. Lengths in frames and in features."""

    time_probability: float = 0.05
    time_length: int = 10
    time_min_masks: int = 2
    feature_probability: float = 0.0
    feature_length: int = 10
    feature_min_masks: int = 0


class SpecAugment(nn.Module):
    """Masks frames and features in training and lets everything through in evaluation.

    It sits between a network's projection and its position convolution: `Wav2Vec2.masking`.

    embedding: (H,), what stands in for a masked frame; checkpoints call it `mask_emb` (fairseq) and
    `masked_spec_embed` (transformers).
    """

    def __init__(self, config: SpecAugmentConfig, width: int, rng: np.random.RandomState) -> None:
        super().__init__()
        self.config, self.rng = config, rng
        self.embedding = nn.Parameter(torch.empty(width).uniform_())

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> Tensor:
        """(B, F, H), frames of each clip -> (B, F, H)"""
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
