"""Several contours of one clip made one, by vote."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

_OCTAVE_APART_CENTS = 600.0  # from here on the nearer octave is another one


def combine(contours: NDArray[np.float32]) -> Array:
    """One contour (F,) of those of M methods (M, F), all in Hz, 0 = unvoiced.

    A frame is voiced where at least half of the methods say so. Its octave is the one that most of
    them are nearest to, where they disagree by half an octave or more; the median of those in that
    octave, in log f0, is the pitch.
    """
    voiced = contours > 0
    log = np.log2(np.where(voiced, contours, 1.0).astype(np.float64))
    distance = np.abs(log[:, None] - log[None, :])  # (M, M, F)
    near = (distance < _OCTAVE_APART_CENTS / 1200) & voiced[:, None] & voiced[None, :]
    votes = near.sum(axis=1)  # (M, F): how many agree with each method, itself among them
    # Of equal votes the one nearest to the median of all: one of them, never between two octaves.
    spread = np.where(voiced[:, None] & voiced[None, :], distance, 0.0).sum(axis=1)
    best = np.lexsort((spread, -votes), axis=0)[0]  # (F,)
    frames = np.arange(contours.shape[1])
    chosen = near[best, :, frames].T  # (M, F): those in the octave that won
    pitch = np.nanmedian(np.where(chosen, log, np.nan), axis=0, keepdims=False)
    keep = 2 * voiced.sum(axis=0) >= len(contours)
    return np.where(keep & chosen.any(axis=0), np.exp2(pitch), 0.0).astype(np.float32)
