"""Pitch as singing voice conversion programs pass it on: cleaning, MIDI numbers, their resizing.

The functions are those of the article "SO-VITS-SVC 源码解析 7" (its VitsSvc), under its names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MOSTLY_UNVOICED = 0.9


def clean_pitch(
    pitch: NDArray[np.floating] | NDArray[np.integer], unvoiced: float = 0.0
) -> NDArray[np.floating] | NDArray[np.integer]:
    """A track (F,) of which more than 90 % is unvoiced becomes unvoiced as a whole.

    unvoiced: the value that marks such frames: 0 in Hz, 1 in mel bins (`f0_to_coarse`). The article
    looks for 1, which its f0 in Hz never holds, so there the function never acts; what it means is
    to drop the few stray frames of a track without a voice. The track itself is left as it is.
    """
    if np.count_nonzero(pitch == unvoiced) > _MOSTLY_UNVOICED * len(pitch):
        return np.full_like(pitch, unvoiced)
    return pitch


def f0_to_pitch(f0: NDArray[np.floating]) -> NDArray[np.float64]:
    """MIDI numbers of f0 in Hz, any shape: 69 is 440 Hz, a semitone is 1; NaN where unvoiced (0).

    The article gives -inf there. MIDI number 0 is a pitch (8.2 Hz), so it cannot mark silence.
    """
    voiced = np.where(f0 > 0, f0, np.nan).astype(np.float64)
    pitch: NDArray[np.float64] = 69 + 12 * np.log2(voiced / 440)
    return pitch


def resize2d_f0(f0: NDArray[np.floating], n_frames: int) -> NDArray[np.float64]:
    """A contour (N,) in Hz as n_frames, linear, each value i at i * n_frames / N; 0 = unvoiced.

    Unvoiced neighbours win, so each voiced run loses its edge. `stages.frames.resize_contour` keeps
    edges and knows when each value holds; this one is for the numbers of so-vits-svc.
    """
    at = np.arange(n_frames) * len(f0) / n_frames
    gaps = np.where(f0 < 0.001, np.nan, f0)
    return np.nan_to_num(np.interp(at, np.arange(len(f0)), gaps))
