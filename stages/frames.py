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
"""An f0 contour on its own clock: Hz, 0 = unvoiced, and when each value holds; both (N,)."""

_ANOTHER_NOTE = math.sqrt(2)  # half an octave from one value to the next is no glide


def num_frames(num_samples: int, hop_length: int) -> int:
    """Frames of a clip: the whole hops in it."""
    return num_samples // hop_length


def resize_contour(
    f0: NDArray[np.floating],
    positions: NDArray[np.floating],
    n_frames: int,
    hop_length: int,
    mode: Literal["linear", "nearest"] = "linear",
) -> Array:
    """Puts an f0 contour that has its own clock on the frame clock.

    f0: (N,) in Hz, 0 = unvoiced. positions: (N,) samples at which those values hold, ascending.
    Returns float32 (n_frames,).

    `linear` blends two neighbours that are both voiced and less than half an octave apart, in Hz;
    elsewhere the nearer one decides alone, so nothing is ever blended across a gap, and an octave
    error does not become a fifth. `nearest` always takes the nearer one (the later of two equally
    near). Half a step of the source beyond either end is unvoiced.
    """
    source = np.asarray(f0, dtype=np.float64)
    at = np.asarray(positions, dtype=np.float64)
    if source.shape != at.shape or source.ndim != 1:
        raise ValueError(f"a contour {source.shape} does not fit its positions {at.shape}")
    if len(source) == 0:
        return np.zeros(n_frames, dtype=np.float32)
    target = np.arange(n_frames) * float(hop_length)
    if len(source) == 1:  # no step to measure by: it reaches half a hop
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
        one_note = np.maximum(a, b) < _ANOTHER_NOTE * np.minimum(a, b)
        out = np.where(one_note, blend, nearest)
    out[(weight < -0.5) | (weight > 1.5)] = 0.0
    return out.astype(np.float32)
