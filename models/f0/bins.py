"""Pitch as a distribution over bins of 20 cents, as CREPE, FCPE and RMVPE give it."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 360
CENTS_PER_BIN = 20.0
LOWEST_CENTS = 1997.3794084376191  # above 10 Hz; of bin 0 of CREPE and RMVPE
_REACH = 4  # bins to either side of the highest one that count


def hz_of_cents(cents: Tensor) -> Tensor:
    """Cents above 10 Hz as Hz."""
    return 10.0 * torch.exp2(cents / 1200.0)


def local_average(salience: Tensor, cents: Tensor, around: Tensor | None = None) -> Tensor:
    """The mean of the bins within 4 of one bin a frame, weighted by salience.

    salience: (F, K), not negative. cents: (K,), of each bin. around: (F,), that bin; None: the
    highest one, the first of equally high ones. Returns (F,) in cents; nan where there is no
    salience at all.
    """
    centre = salience.argmax(dim=1) if around is None else around
    near = centre[:, None] + torch.arange(-_REACH, _REACH + 1, device=salience.device)
    inside = (near >= 0) & (near < salience.shape[1])
    near = near.clamp(0, salience.shape[1] - 1)
    weights = salience.gather(1, near) * inside
    return (weights * cents[near]).sum(dim=1) / weights.sum(dim=1)
