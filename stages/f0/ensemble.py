"""Combination of several contours of one clip by vote."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

_SAME_PITCH = 0.5  # octaves: values closer than this count as the same pitch


def combine(contours: NDArray[np.float32]) -> Array:
    """Combine the contours of M methods (M, F) into one (F,), all in Hz, 0 = unvoiced.

    A frame is voiced where at least half of the methods are. A voiced method gets one vote from
    each method within half an octave of it, itself included. The pitch is the median, in log f0, of
    the voters of the method with the most votes. Ties between methods further apart go to the one
    closest to the straight line, in log f0, between the frames without a tie. If every frame has a
    tie, the first method wins.
    """
    voiced = contours > 0
    pitch = np.zeros(contours.shape[1], dtype=np.float32)
    keep = np.flatnonzero(2 * voiced.sum(axis=0) >= len(contours))
    if len(keep) == 0:
        return pitch
    log = np.full((len(contours), len(keep)), np.nan)
    np.log2(contours[:, keep], out=log, where=voiced[:, keep], dtype=np.float64)
    near = np.abs(log[:, None] - log[None, :]) < _SAME_PITCH  # (M, M, F); False if unvoiced
    votes = near.sum(axis=1)  # (M, F)
    leaders = np.where(votes == votes.max(axis=0), log, np.nan)
    agreed = np.nanmax(leaders, axis=0) - np.nanmin(leaders, axis=0) < _SAME_PITCH
    line = np.nanmedian(leaders, axis=0)
    if agreed.any():
        line = np.interp(keep, keep[agreed], line[agreed])
    else:
        line = log[np.isfinite(leaders).argmax(axis=0), np.arange(len(keep))]
    winner = np.nanargmin(np.abs(leaders - line), axis=0)
    voters = near[winner, :, np.arange(len(keep))].T
    pitch[keep] = np.exp2(np.nanmedian(np.where(voters, log, np.nan), axis=0))
    return pitch
