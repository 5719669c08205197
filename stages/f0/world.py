"""WORLD's estimators DIO (`stages.f0.dio`) and Harvest (pyworld), each refined by StoneMask.

M. Morise, "Harvest: a high-performance fundamental frequency estimator from speech signals",
Interspeech 2017.

Tested by tests/stages/f0/test_estimate.py.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.f0.dio import dio_track
from stages.frames import Track
from stages.types import Array

_POINTS = 128  # points at which two periods are compared with the two one period later
_BLOCK_FRAMES = 4096  # bounds the memory of that comparison

# Harvest's memory grows faster than the clip: 0.6 GB for one minute, 11 GB for five. Longer clips
# run in blocks.
_HARVEST_BLOCK_S = 60
_HARVEST_CONTEXT_S = 2  # on either side of a block


def dio(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """Estimate f0 with DIO: Hz and sample positions."""
    return _on_samples("dio", wav, sample_rate, cfg)


def harvest(wav: Array, sample_rate: int, cfg: F0Config) -> Track:
    """Estimate f0 with Harvest: Hz and sample positions."""
    return _on_samples("harvest", wav, sample_rate, cfg)


def world_track(
    estimator: Literal["dio", "harvest"], wav: Array, sample_rate: int, cfg: F0Config
) -> Track:
    """Estimate f0 with WORLD, refined by StoneMask; times in seconds.

    Next to digital silence WORLD's DIO returns rounding errors: up to 0.1 % of the frames of a clip
    with hard gates change with the level of the clip. Everywhere else this DIO is within 0.01 cents
    of WORLD's.
    """
    import pyworld

    samples = wav.astype(np.float64)
    if estimator == "dio":
        f0, times = dio_track(samples, sample_rate, cfg.f0_min, cfg.f0_max, cfg.hop_length)
    else:
        f0, times = harvest_track(samples, sample_rate, cfg)
    return pyworld.stonemask(samples, f0, times, sample_rate), times


def harvest_track(wav: NDArray[np.float64], sample_rate: int, cfg: F0Config) -> Track:
    """Estimate f0 with Harvest, before StoneMask; times in seconds.

    Harvest estimates every millisecond and takes the nearest estimate for each frame. Blocks do the
    same: they start at whole seconds, have context on both sides, and end so that Harvest's
    decimation keeps the same samples as in the whole clip. Harvest subtracts the mean of its input,
    so blocks differ from the whole clip by up to 0.03 cents.
    """
    import pyworld

    def run(samples: NDArray[np.float64], period_ms: float) -> Track:
        f0, times = pyworld.harvest(
            samples, sample_rate, f0_floor=cfg.f0_min, f0_ceil=cfg.f0_max, frame_period=period_ms
        )
        return f0, times

    hop_ms = 1000 * cfg.hop_length / sample_rate
    block, context = _HARVEST_BLOCK_S * sample_rate, _HARVEST_CONTEXT_S * sample_rate
    if len(wav) <= block + 2 * context:
        return run(wav, hop_ms)
    kept_of = max(1, round(sample_rate / 8000))
    parts = []
    for start in range(0, len(wav), block):
        first, last = max(0, start - context), min(len(wav), start + block + context)
        last -= (last - len(wav)) % kept_of
        f0, _ = run(wav[first:last], 1.0)
        skip = 1000 * (start - first) // sample_rate
        parts.append(f0[skip : skip + 1000 * _HARVEST_BLOCK_S])
    every_ms = np.concatenate(parts)
    times = np.arange(int(1000 * len(wav) / sample_rate / hop_ms) + 1) * hop_ms / 1000
    nearest = np.floor(1000 * times + 0.5).astype(np.intp)
    return every_ms[np.minimum(nearest, len(every_ms) - 1)], times


def _on_samples(
    estimator: Literal["dio", "harvest"], wav: Array, sample_rate: int, cfg: F0Config
) -> Track:
    f0, times = world_track(estimator, wav, sample_rate, cfg)
    positions = times * sample_rate
    if cfg.voicing_threshold is not None:
        strength = periodicity(wav, f0, positions, sample_rate)
        f0 = np.where(strength >= cfg.voicing_threshold, f0, 0.0)
    return f0, positions


def periodicity(
    wav: Array, f0: NDArray[np.float64], positions: NDArray[np.float64], sample_rate: int
) -> NDArray[np.float64]:
    """Measure how well the signal around each frame repeats after one period; (N,).

    -1 to 1, 0 where unvoiced: the normalised correlation of the two periods centred half a period
    before the frame with the two centred half a period after it. Samples outside the clip count as
    its first or last one.
    """
    strength = np.zeros(len(f0))
    voiced = np.flatnonzero(f0 > 0)
    grid = np.arange(len(wav))
    offsets = np.linspace(-1.5, 0.5, _POINTS, endpoint=False)  # periods from the frame
    for start in range(0, len(voiced), _BLOCK_FRAMES):
        frames = voiced[start : start + _BLOCK_FRAMES]
        period = sample_rate / f0[frames, None]
        earlier = positions[frames, None] + offsets * period  # (frames, points)
        a = np.interp(earlier, grid, wav)
        b = np.interp(earlier + period, grid, wav)
        power = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        strength[frames] = (a * b).sum(axis=1) / np.maximum(power, np.finfo(np.float64).tiny)
    return strength
