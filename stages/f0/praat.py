"""Praat's autocorrelation method, through parselmouth.

P. Boersma, "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise
ratio of a sampled sound", IFA Proceedings 17, 1993.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.frames import Track
from stages.types import Array

_DEFAULT_VOICING = 0.6  # Praat's own default is 0.45; singing voice conversion uses 0.6
_PERIODS_IN_WINDOW = 3  # of f0_min


def praat(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """f0 in Hz and the samples that its values belong to.

    Praat centres its frames in the sound and keeps half a window away from both ends. Zeros around
    the clip move its frames onto the samples 0, hop, 2 * hop, ... and let them reach the ends.
    Against hand annotation that beats interpolation between Praat's own frames.
    """
    hop = cfg.hop_length
    half_window = _PERIODS_IN_WINDOW / cfg.f0_min / 2 * sample_rate
    # Praat fits as many frames as it can; a quarter hop keeps that count from hanging on rounding.
    front = math.ceil(half_window + hop / 4)
    frames = max(0, math.ceil((len(wav) - front) / hop)) + 1
    padded = np.zeros(2 * front + (frames - 1) * hop, dtype=np.float64)
    padded[front : front + len(wav)] = wav
    f0, times = praat_track(padded, sample_rate, cfg)
    return f0, times * sample_rate - front


def praat_track(wav: Array | NDArray[np.float64], sample_rate: int, cfg: F0Config) -> Track:
    """What Praat returns for the sound as it is; times in seconds.

    Empty where the sound is shorter than the window (three periods of f0_min).
    """
    import parselmouth

    if len(wav) / sample_rate < _PERIODS_IN_WINDOW / cfg.f0_min:
        return np.zeros(0), np.zeros(0)
    voicing = _DEFAULT_VOICING if cfg.voicing_threshold is None else cfg.voicing_threshold
    pitch = parselmouth.Sound(wav, sample_rate).to_pitch_ac(
        time_step=cfg.hop_length / sample_rate,
        pitch_floor=cfg.f0_min,
        pitch_ceiling=cfg.f0_max,
        voicing_threshold=voicing,
    )
    return pitch.selected_array["frequency"], pitch.xs()


def praat_cc(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """The same by Praat's cross-correlation."""
    raise NotImplementedError
