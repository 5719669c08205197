"""Pitch as a distribution over bins of 20 cents, as in CREPE, FCPE and RMVPE.

Tested by tests/models/f0/test_rmvpe.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 360
CENTS_PER_BIN = 20.0
LOWEST_CENTS = 1997.3794084376191  # bin 0 of CREPE and RMVPE, in cents above 10 Hz
_REACH = 4  # bins on either side of the highest one in the average


def hz_of_cents(cents: Tensor) -> Tensor:
    """Convert cents above 10 Hz to Hz."""
    return 10.0 * torch.exp2(cents / 1200.0)


def local_average(salience: Tensor, cents: Tensor, around: Tensor | None = None) -> Tensor:
    """Average the bins within 4 of one bin per frame, weighted by salience.

    salience: (F, K), not negative. cents: (K,), of each bin. around: (F,), that bin; None: the
    highest one, the first of a tie. Returns (F,) in cents; nan where all salience is 0.
    """
    centre = salience.argmax(dim=1) if around is None else around
    near = centre[:, None] + torch.arange(-_REACH, _REACH + 1, device=salience.device)
    inside = (near >= 0) & (near < salience.shape[1])
    near = near.clamp(0, salience.shape[1] - 1)
    weights = salience.gather(1, near) * inside
    return (weights * cents[near]).sum(dim=1) / weights.sum(dim=1)
