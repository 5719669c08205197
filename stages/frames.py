"""The frame clock: frame i of a clip belongs to sample i * hop_length.

Audio, f0 and spectrogram share this clock at the dataset's rate. Units keep their encoder's clock.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

Track = tuple[NDArray[np.float64], NDArray[np.float64]]
"""An f0 contour on its own clock: Hz, 0 = unvoiced, and the position of each value; both (N,)."""

_MAX_STEP = math.sqrt(2)  # ratio of neighbours; half an octave or more is not a glide


def num_frames(num_samples: int, hop_length: int) -> int:
    """Return the number of frames of a clip: its whole hops."""
    return num_samples // hop_length


def resize_contour(
    f0: NDArray[np.floating],
    positions: NDArray[np.floating],
    n_frames: int,
    hop_length: int,
    mode: Literal["linear", "nearest"] = "linear",
) -> Array:
    """Resample an f0 contour from its own clock to the frame clock.

    f0: (N,) in Hz, 0 = unvoiced. positions: (N,) the sample of each value, ascending.
    Returns float32 (n_frames,).

    `linear` interpolates in Hz between two voiced neighbours less than half an octave apart.
    Elsewhere it takes the nearer value, so it never interpolates across a gap and never turns an
    octave error into a fifth. `nearest` always takes the nearer value (the later one of a tie).
    Frames more than half a source step beyond either end are unvoiced.
    """
    source = np.asarray(f0, dtype=np.float64)
    at = np.asarray(positions, dtype=np.float64)
    if source.shape != at.shape or source.ndim != 1:
        raise ValueError(f"f0 {source.shape} and positions {at.shape} must be equal and 1-D")
    if len(source) == 0:
        return np.zeros(n_frames, dtype=np.float32)
    target = np.arange(n_frames) * float(hop_length)
    if len(source) == 1:  # there is no source step: the value reaches half a hop
        inside = np.abs(target - at[0]) <= hop_length / 2
        return np.where(inside, source[0], 0.0).astype(np.float32)

    left = np.clip(np.searchsorted(at, target, side="right") - 1, 0, len(at) - 2)
    step = at[left + 1] - at[left]
    weight = (target - at[left]) / step  # 0 at the left value, 1 at the right one
    a, b = source[left], source[left + 1]
    nearest = np.where(weight < 0.5, a, b)
    if mode == "nearest":
        out = nearest
    else:
        blend = a + np.clip(weight, 0.0, 1.0) * (b - a)
        close = np.maximum(a, b) < _MAX_STEP * np.minimum(a, b)
        out = np.where(close, blend, nearest)
    out[(weight < -0.5) | (weight > 1.5)] = 0.0
    return out.astype(np.float32)
