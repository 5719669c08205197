"""Pitch helpers of singing voice conversion: cleaning, MIDI numbers, resizing.

The functions and their names are those of the article "SO-VITS-SVC 源码解析 7" (its VitsSvc).

Tested by tests/stages/f0/test_post.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MOSTLY_UNVOICED = 0.9


def clean_pitch(
    pitch: NDArray[np.floating] | NDArray[np.integer], unvoiced: float = 0.0
) -> NDArray[np.floating] | NDArray[np.integer]:
    """Mark a track (F,) as unvoiced throughout if more than 90 % of it is.

    This drops the stray frames of a track without a voice. unvoiced: the value of unvoiced frames:
    0 in Hz, 1 in mel bins (`f0_to_coarse`). The article compares with 1, which f0 in Hz never is,
    so there the function has no effect. The input is not modified.
    """
    if np.count_nonzero(pitch == unvoiced) > _MOSTLY_UNVOICED * len(pitch):
        return np.full_like(pitch, unvoiced)
    return pitch


def f0_to_pitch(f0: NDArray[np.floating]) -> NDArray[np.float64]:
    """Convert f0 in Hz, any shape, to MIDI numbers: 69 is 440 Hz; NaN where unvoiced (0).

    The article gives -inf there. MIDI number 0 is a pitch (8.2 Hz), so it cannot mark silence.
    """
    voiced = np.where(f0 > 0, f0, np.nan).astype(np.float64)
    pitch: NDArray[np.float64] = 69 + 12 * np.log2(voiced / 440)
    return pitch


def resize2d_f0(f0: NDArray[np.floating], n_frames: int) -> NDArray[np.float64]:
    """Resize a contour (N,) in Hz to n_frames, linearly, value i at i * n_frames / N; 0 = unvoiced.

    Unvoiced neighbours win, so each voiced run loses its edge. `stages.frames.resize_contour` keeps
    edges and uses the position of each value; this function reproduces so-vits-svc.
    """
    at = np.arange(n_frames) * len(f0) / n_frames
    gaps = np.where(f0 < 0.001, np.nan, f0)
    return np.nan_to_num(np.interp(at, np.arange(len(f0)), gaps))
