"""Praat's autocorrelation and cross-correlation methods, through parselmouth.

P. Boersma, "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise
ratio of a sampled sound", IFA Proceedings 17, 1993 (autocorrelation). Cross-correlation compares
one period of sound with the next one, without a window.

Tested by tests/stages/f0/test_estimate.py.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.frames import Track
from stages.types import Array

Correlation = Literal["ac", "cc"]

_DEFAULT_VOICING = 0.6  # Praat's own default is 0.45; singing voice conversion uses 0.6
_PERIODS = {"ac": 3, "cc": 2}  # periods of f0_min in one analysis frame


def praat(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """Estimate f0 by autocorrelation: Hz and sample positions."""
    return _on_samples("ac", wav, sample_rate, cfg)


def praat_cc(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """Estimate f0 by cross-correlation: better at quick changes, about twenty times slower."""
    return _on_samples("cc", wav, sample_rate, cfg)


def _on_samples(correlation: Correlation, wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """Pad the clip so that Praat's frames lie on the frame clock, and estimate f0.

    Praat centres its frames in the sound and stays half an analysis frame away from both ends.
    Zeros around the clip move its frames onto the samples 0, hop, 2 * hop, ... and let them reach
    the ends. Against hand annotation this is better than interpolating Praat's own frames.
    """
    hop = cfg.hop_length
    margin = _PERIODS[correlation] / cfg.f0_min / 2 * sample_rate
    # Praat fits as many frames as it can; a quarter hop makes that count robust to rounding.
    first = math.ceil(margin + hop / 4)  # sample of the first frame
    late = int(sample_rate / cfg.f0_min / 2) if correlation == "cc" else 0
    early = math.ceil(late / hop)  # frames before the clip
    begin = first + early * hop - late
    frames = early + math.ceil(len(wav) / hop) + 1
    padded = np.zeros(2 * first + (frames - 1) * hop, dtype=np.float64)
    padded[begin : begin + len(wav)] = wav
    f0, times = praat_track(padded, sample_rate, cfg, correlation)
    positions = times * sample_rate - begin
    if correlation == "cc":
        positions = _middles(f0, positions - late, sample_rate)
    return f0, positions


def _middles(
    f0: NDArray[np.float64], positions: NDArray[np.float64], sample_rate: int
) -> NDArray[np.float64]:
    """Shift cross-correlation values to their positions.

    A value belongs half a period of f0 after the middle of the first of the two compared sections.
    """
    voiced = np.flatnonzero(f0)
    if len(voiced) == 0:
        return positions
    half_period = np.interp(np.arange(len(f0)), voiced, sample_rate / f0[voiced] / 2)
    # After an octave jump upwards a position may precede the one before it; keep them ascending.
    ascending: NDArray[np.float64] = np.maximum.accumulate(positions + half_period)
    return ascending + 1e-6 * np.arange(len(f0))


def praat_track(
    wav: Array | NDArray[np.float64],
    sample_rate: int,
    cfg: F0Config,
    correlation: Correlation = "ac",
) -> Track:
    """Run Praat on the sound without padding; times in seconds.

    Empty when the sound is shorter than an analysis frame.
    """
    import parselmouth

    if len(wav) / sample_rate < _PERIODS[correlation] / cfg.f0_min:
        return np.zeros(0), np.zeros(0)
    sound = parselmouth.Sound(wav, sample_rate)
    estimator = sound.to_pitch_ac if correlation == "ac" else sound.to_pitch_cc
    pitch = estimator(
        time_step=cfg.hop_length / sample_rate,
        pitch_floor=cfg.f0_min,
        pitch_ceiling=cfg.f0_max,
        voicing_threshold=(
            _DEFAULT_VOICING if cfg.voicing_threshold is None else cfg.voicing_threshold
        ),
    )
    return pitch.selected_array["frequency"], pitch.xs()
