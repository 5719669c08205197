"""Probabilistic YIN, through librosa.

M. Mauch, S. Dixon, "pYIN: a fundamental frequency estimator using probabilistic threshold
distributions", ICASSP 2014. Its pitches lie on a grid of 10 cents.

Tested by tests/stages/f0/test_estimate.py.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.frames import Track
from stages.types import Array

_OCTAVES_A_SECOND = 35.92  # fastest change of pitch; librosa's default


# librosa keeps spectrum and states of every frame, 0.2 GB a minute: longer clips run in blocks.
_BLOCK_S = 60
_CONTEXT_S = 2  # on either side of a block; the path forgets its start sooner than that


def pyin(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """Estimate f0: Hz and sample positions."""
    hop = cfg.hop_length
    frames = len(wav) // hop + 1
    block = math.ceil(_BLOCK_S * sample_rate / hop)
    context = math.ceil(_CONTEXT_S * sample_rate / hop)
    parts = []
    for start in range(0, frames, block):
        first, last = max(0, start - context), start + block + context
        piece = wav[first * hop :] if last >= frames else wav[first * hop : (last - 1) * hop + 1]
        parts.append(_contour(piece, sample_rate, cfg)[start - first : start - first + block])
    return np.concatenate(parts), np.arange(frames, dtype=np.float64) * hop


def _contour(wav: Array, sample_rate: int, cfg: F0Config) -> NDArray[np.float64]:
    """Estimate f0 in Hz, 0 = unvoiced, at samples 0, hop, ...: (T // hop + 1,)."""
    import librosa

    # Half the window is correlated at lags up to the other half, so the longest period must fit.
    longest_period = int(np.ceil(sample_rate / cfg.f0_min))
    frame_length = 1 << (2 * longest_period + 3).bit_length()
    # librosa fails when the largest change per frame exceeds the range.
    range_semitones = int(12 * np.log2(cfg.f0_max / cfg.f0_min))
    hops_a_second = sample_rate / cfg.hop_length
    octaves_a_second = min(_OCTAVES_A_SECOND, range_semitones / 12 * hops_a_second)
    f0, voiced, probability = librosa.pyin(
        wav,
        fmin=cfg.f0_min,
        fmax=cfg.f0_max,
        sr=sample_rate,
        frame_length=frame_length,
        hop_length=cfg.hop_length,
        max_transition_rate=octaves_a_second,
        fill_na=None,
    )
    if cfg.voicing_threshold is not None:
        voiced = probability >= cfg.voicing_threshold
    contour: NDArray[np.float64] = np.where(voiced, f0, 0.0)
    return contour
