"""Pitch as the synthesizer takes it: mel bins, transposition, log f0 around its mean.

B batch, F frames. f0 is in Hz with 0 where unvoiced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def f0_to_coarse(
    f0: Tensor, bins: int = 256, f0_min: float = 50.0, f0_max: float = 1100.0, peer: bool = False
) -> Tensor:
    """Mel bins 1 to bins - 1 of f0 in Hz, any shape; int64, for an embedding of `bins` rows.

    f0_min is the middle of bin 1 and f0_max that of the last one; what lies below or above counts
    as f0_min or f0_max, and unvoiced frames as f0_min. mel = 1127 ln(1 + f0 / 700).

    peer: the numbers of so-vits-svc (commit 730930d), on whose embeddings its voices are trained.
    They differ above f0_max alone: from half a bin above it (1103 Hz) on, f0 is in bin 0.

    Raises ValueError for a range that does not rise from above 0 Hz, and for fewer than 3 bins.
    """
    if bins < 3 or not 0 < f0_min < f0_max:
        raise ValueError(
            f"mel bins need f0_min below f0_max, both above 0 Hz, and 3 bins or more, "
            f"not {f0_min} to {f0_max} Hz in {bins} bins"
        )
    lowest, highest = (1127 * math.log(1 + hz / 700) for hz in (f0_min, f0_max))
    per_mel = (bins - 2) / (highest - lowest)
    mel = 1127 * torch.log(1 + f0 / 700)
    place = torch.round(mel * per_mel - (lowest * per_mel - 1))
    coarse = place.clamp(1, bins - 1).long()
    return coarse.masked_fill(place > bins - 1, 0) if peer else coarse


def transpose(f0: Tensor, semitones: float | Tensor) -> Tensor:
    """f0 in Hz moved up by `semitones` (down where negative); unvoiced frames stay 0.

    A tensor of semitones is broadcast against f0.
    """
    return f0 * 2 ** (semitones / 12)


def normalize_f0(
    log_f0: Tensor, mask: Tensor, voiced: Tensor, factor: Tensor | None = None
) -> Tensor:
    """Log f0 (B, 1, F) less its mean over voiced frames, times `factor`; 0 where mask is 0.

    mask: (B, 1, F), 1 in frames and 0 in padding. voiced: (B, F), 1 where voiced and 0 elsewhere,
    padding included. Where nothing is voiced, nothing is taken off.

    factor: (B,), how much each contour is stretched around its mean; None is 1. so-vits-svc trains
    its pitch predictor with factors drawn evenly from 0.8 to 1.2 and infers with 1.

    Source: so-vits-svc (commit 730930d).
    """
    voiced = voiced.to(log_f0.dtype)
    count = voiced.sum(dim=1).clamp(min=1)
    mean = (log_f0[:, 0] * voiced).sum(dim=1) / count  # (B,)
    centred = log_f0 - mean[:, None, None]
    if factor is not None:
        centred = centred * factor[:, None, None]
    return centred * mask
