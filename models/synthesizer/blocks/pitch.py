"""Pitch inputs of the synthesizer: mel bins, and log f0 around its mean.

B batch, F frames. f0 is in Hz with 0 where unvoiced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def f0_to_coarse(
    f0: Tensor, bins: int = 256, f0_min: float = 50.0, f0_max: float = 1100.0, sovits: bool = False
) -> Tensor:
    """Convert f0 in Hz, any shape, to int64 mel bins 1 to bins - 1, for `bins` embedding rows.

    f0_min is the middle of bin 1 and f0_max that of the last one. Lower and higher values count as
    f0_min and f0_max, unvoiced frames as f0_min. mel = 1127 ln(1 + f0 / 700).

    sovits: the bins of so-vits-svc (commit 730930d), which its voices are trained with. They differ
    only above f0_max: from half a bin above it (1103 Hz) on, f0 is in bin 0.

    Raises: ValueError: when f0_min is not above 0 and below f0_max, or bins is below 3.
    """
    if bins < 3 or not 0 < f0_min < f0_max:
        raise ValueError(
            f"mel bins need 0 < f0_min < f0_max and 3 bins or more, "
            f"not {f0_min} to {f0_max} Hz in {bins} bins"
        )
    lowest, highest = (1127 * math.log(1 + hz / 700) for hz in (f0_min, f0_max))
    per_mel = (bins - 2) / (highest - lowest)
    mel = 1127 * torch.log(1 + f0 / 700)
    place = torch.round(mel * per_mel - (lowest * per_mel - 1))
    coarse = place.clamp(1, bins - 1).long()
    return coarse.masked_fill(place > bins - 1, 0) if sovits else coarse


def normalize_f0(
    log_f0: Tensor, mask: Tensor, voiced: Tensor, factor: Tensor | None = None
) -> Tensor:
    """Subtract the mean over voiced frames from log f0 (B, 1, F) and multiply by `factor`.

    mask: (B, 1, F), 1 in frames and 0 in padding, where the result is 0. voiced: (B, F), 1 where
    voiced and 0 elsewhere, padding included. Without a voiced frame nothing is subtracted.

    factor: (B,), stretches each contour around its mean; None is 1. so-vits-svc trains its pitch
    predictor with factors drawn uniformly from 0.8 to 1.2 and infers with 1.

    Source: so-vits-svc (commit 730930d).
    """
    voiced = voiced.to(log_f0.dtype)
    count = voiced.sum(dim=1).clamp(min=1)
    mean = (log_f0[:, 0] * voiced).sum(dim=1) / count  # (B,)
    centred = log_f0 - mean[:, None, None]
    if factor is not None:
        centred = centred * factor[:, None, None]
    return centred * mask
