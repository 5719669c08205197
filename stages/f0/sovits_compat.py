"""f0 contours with the values and the timing of so-vits-svc (commit 730930d).

Voice conversion models trained on these contours have learnt their timing too. Each function of
`SOVITS_METHODS` returns so-vits-svc's f0 before it fills unvoiced frames; `fill_unvoiced` fills.

Tested by tests/stages/f0/test_estimate.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.f0.crepe import hz_of_bins, path_through, salience_of
from stages.f0.fcpe import fcpe_frames
from stages.f0.networks import network
from stages.f0.pitch import resize2d_f0
from stages.f0.post import a_weighting
from stages.f0.praat import praat_track
from stages.f0.rmvpe import rmvpe_frames
from stages.f0.world import world_track
from stages.types import Array


def sovits_praat(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """Estimate with Praat, zeros on both sides: frame i is the pitch at about (i + 0.83) hops."""
    f0, _ = praat_track(wav, sample_rate, cfg)
    return pad_centred(f0, n_frames)


def sovits_dio(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """Estimate with DIO, rounded to 0.1 Hz, its n + 1 frames resized to n."""
    f0, _ = world_track("dio", wav, sample_rate, cfg)
    return resize2d_f0(np.round(f0, 1), n_frames)


def sovits_harvest(
    wav: Array, sample_rate: int, cfg: F0Config, n_frames: int
) -> NDArray[np.float64]:
    """Estimate with Harvest, its n + 1 frames resized to n."""
    f0, _ = world_track("harvest", wav, sample_rate, cfg)
    return resize2d_f0(f0, n_frames)


def sovits_fcpe(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """Estimate with FCPE above 0.05, stretched over the clip; f0_min and f0_max are ignored."""
    (f0,) = fcpe_frames([wav], sample_rate, cfg, 0.05)
    return stretch(f0, n_frames)


def sovits_rmvpe(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """Estimate with RMVPE above 0.05, stretched over the clip; f0_min and f0_max are ignored."""
    (f0,) = rmvpe_frames([wav], sample_rate, cfg, 0.05)
    return stretch(f0, n_frames)


def sovits_crepe(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """Estimate with full CREPE as torchcrepe 0.0.24 runs it, stretched over the clip.

    The hop is truncated to whole samples at 16 kHz, and the path restarts every 1024 frames. A
    frame next to voiced ones gets their mean. The silence gate depends on the recording's level, so
    quiet singing loses frames. torchcrepe adds random noise of up to 20 cents to each frame; it is
    left out here.
    """
    wav_16k = _resampy_16k(wav, sample_rate)
    hop = cfg.hop_length * 16000 // sample_rate
    if hop == 0:
        raise ValueError(f"f0.hop_length {cfg.hop_length} is too short for f0.align=peer")
    if len(wav_16k) == 0:
        return np.zeros(n_frames)
    centres = np.arange(0.0, len(wav_16k) + 1, hop)
    (salience,) = salience_of(network("crepe", cfg), [wav_16k], [centres])
    parts = np.split(salience, np.arange(1024, len(salience), 1024))
    paths = [path_through(part, cfg.f0_min, cfg.f0_max) for part in parts]
    bins, periodicity = (np.concatenate(each) for each in zip(*paths, strict=True))
    threshold = 0.05 if cfg.voicing_threshold is None else cfg.voicing_threshold
    periodicity = np.median(_with_neighbours(periodicity, -np.inf), axis=0)
    voiced = (periodicity >= threshold) & (_crepe_level_db(wav_16k, hop) >= -60)
    count = _with_neighbours(voiced, 0).sum(axis=0)
    f0 = _with_neighbours(np.where(voiced, hz_of_bins(bins), 0.0), 0).sum(axis=0)
    return stretch(f0 / np.maximum(count, 1), n_frames)


def _with_neighbours(values: NDArray[Any], beyond: float) -> NDArray[Any]:
    """Stack each value with its neighbours, (F,) -> (3, F): previous, own, next."""
    padded = np.pad(values, 1, constant_values=beyond)
    return np.stack([padded[:-2], values, padded[2:]])


def _resampy_16k(wav: Array, sample_rate: int) -> Array:
    """Resample to 16 kHz like resampy 0.4 ("kaiser_best"): 50 zero crossings on each side.

    resampy truncates its steps through the filter table, which changes samples by less than 0.1 %
    of the peak; this is exact.
    """
    import scipy.signal

    if sample_rate == 16000:
        return wav
    ratio = Fraction(16000, sample_rate)
    longer = max(ratio.numerator, ratio.denominator)
    crossings = np.arange(-50 * longer, 50 * longer + 1) / longer
    rolloff = 0.9173473711
    taps = rolloff * np.sinc(rolloff * crossings) * np.kaiser(len(crossings), 12.984585247)
    wav_16k = scipy.signal.resample_poly(
        wav, ratio.numerator, ratio.denominator, window=(taps / longer).astype(np.float32)
    )
    return np.asarray(wav_16k[: math.floor(len(wav) * ratio)], dtype=np.float32)


def _crepe_level_db(wav: Array, hop_length: int) -> NDArray[np.floating]:
    """Compute torchcrepe's loudness around the samples 0, hop, ... at 16 kHz; (F,).

    The mean over all frequencies of the A-weighted level in dB; it differs from other meters.
    """
    hann = (np.sin(np.pi * np.arange(1024) / 1024) ** 2).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(wav, 512), 1024)[::hop_length]
    spectrum = 20 * np.log10(np.maximum(np.abs(np.fft.rfft(windows * hann)), 1e-5))
    spectrum = np.maximum(spectrum, spectrum.max() - 80)
    weights = 20 * np.log10(np.maximum(a_weighting(np.arange(513) * 16000 / 1024), 1e-4))
    level: NDArray[np.floating] = np.maximum(spectrum + weights - 20, -100).mean(axis=1)
    return level


SOVITS_METHODS: dict[str, Callable[[Array, int, F0Config, int], NDArray[np.float64]]] = {
    "praat": sovits_praat,
    "dio": sovits_dio,
    "harvest": sovits_harvest,
    "fcpe": sovits_fcpe,
    "crepe": sovits_crepe,
    "rmvpe": sovits_rmvpe,
}


def pad_centred(f0: NDArray[np.float64], n_frames: int) -> NDArray[np.float64]:
    """Pad with zeros on both sides, the odd one in front; surplus frames are cut at the end."""
    missing = max(0, n_frames - len(f0))
    before = (missing + 1) // 2
    return np.pad(f0, (before, missing - before))[:n_frames]


def stretch(f0: NDArray[np.float64], n_frames: int) -> NDArray[np.float64]:
    """Stretch a contour to n_frames evenly spaced points; each takes the value at or before it."""
    step = np.float32(len(f0) / n_frames)
    at = np.floor(np.arange(n_frames, dtype=np.float32) * step).astype(np.intp)
    nearest: NDArray[np.float64] = f0[np.minimum(at, len(f0) - 1)]
    return nearest


def fill_unvoiced(
    f0: NDArray[np.float64], sample_rate: int, hop_length: int
) -> NDArray[np.float64]:
    """Interpolate unvoiced frames linearly; the ends keep the last value; all zeros if unvoiced.

    so-vits-svc stores the times of voiced frames in float32, which shifts voiced values too (by
    0.06 cents in half a minute). This does the same.
    """
    voiced = np.flatnonzero(f0 > 0)
    if len(voiced) == 0:
        return np.zeros(len(f0))
    hop_s = hop_length / sample_rate
    times = np.float32(hop_s) * voiced.astype(np.float32)
    return np.interp(np.arange(len(f0)) * hop_length / sample_rate, times, f0[voiced])
