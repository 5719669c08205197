"""Several contours of one clip made one, by vote."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

_ONE_OCTAVE = 0.5  # octaves: values that are nearer than this are meant as the same pitch


def combine(contours: NDArray[np.float32]) -> Array:
    """One contour (F,) of those of M methods (M, F), all in Hz, 0 = unvoiced.

    A frame is voiced where at least half of the methods say so. Each of these has the votes of all
    within half an octave of it, itself included; the pitch is the median, in log f0, of those that
    vote for the one with most. Where methods further apart have equally many, the nearest to the
    neighbouring frames wins: to the straight line, in log f0, between those that had no such tie;
    where every frame has one, the method that comes first.
    """
    voiced = contours > 0
    pitch = np.zeros(contours.shape[1], dtype=np.float32)
    keep = np.flatnonzero(2 * voiced.sum(axis=0) >= len(contours))
    if len(keep) == 0:
        return pitch
    log = np.full((len(contours), len(keep)), np.nan)
    np.log2(contours[:, keep], out=log, where=voiced[:, keep], dtype=np.float64)
    near = np.abs(log[:, None] - log[None, :]) < _ONE_OCTAVE  # (M, M, F); never of unvoiced ones
    votes = near.sum(axis=1)  # (M, F)
    leaders = np.where(votes == votes.max(axis=0), log, np.nan)
    agreed = np.nanmax(leaders, axis=0) - np.nanmin(leaders, axis=0) < _ONE_OCTAVE
    line = np.nanmedian(leaders, axis=0)
    if agreed.any():
        line = np.interp(keep, keep[agreed], line[agreed])
    else:
        line = log[np.isfinite(leaders).argmax(axis=0), np.arange(len(keep))]
    winner = np.nanargmin(np.abs(leaders - line), axis=0)
    voters = near[winner, :, np.arange(len(keep))].T
    pitch[keep] = np.exp2(np.nanmedian(np.where(voters, log, np.nan), axis=0))
    return pitch
