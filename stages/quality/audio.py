"""Measures of a clip's samples: clipping, silence, noise, bandwidth.

None depends on the level of the clip, since songs change level before clips exist: a recording that
clipped at full scale and was then turned down still counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stages.quality.measure import Limit, Measure, measure_all
from stages.types import Array

PCM_16_STEP = 1 / 32768

# A flat top. These constants were chosen on 11 recordings of singing and speech. They find at most
# 2 in 10,000 samples of any 5 s as they are. With the highest 1 % clipped, they find 68 to 100 % of
# the clipped samples; with that resampled, which makes flat tops ring, 42 to 90 %.
_FLATNESS = (0.01, 0.003, 0.001)  # of the peak, between neighbours on a top
_SHORTEST_TOP_SAMPLES = 4
_STEEPNESS = 4.0  # of its flanks, over the flatness: a sine's flank reaches about 2
_LOWEST_TOP = 0.7  # of the peak, which resampling lifts above the tops
_LEVEL_SPREAD = 1.06  # tops of one recording lie this close together

_SILENCE_FRAME_S = 0.02
_SILENCE_BELOW_LOUDEST_DB = 40.0
_SILENCE_DBFS = -70.0

_SNR_RANGE_DB = (-20.0, 100.0)
_NOISE_BAND_HZ = 1000.0  # wide enough to see between the harmonics of any voice
_NOISE_SHARE = 0.1
_ENERGY_SHARE = 0.99


@dataclass(frozen=True, eq=False)
class ClipAudio:
    """The samples (T,) of a clip, T > 0, all finite; spectra are computed once."""

    wav: Array
    sample_rate: int

    @cached_property
    def power(self) -> NDArray[np.float32]:
        """(F, K) power spectra."""
        return _power_spectra(self.wav, self.sample_rate)


def measure_quality(
    wav: Array, sample_rate: int, names: Collection[str] | None = None
) -> dict[str, float]:
    """Return the values of `AUDIO_MEASURES` for a clip (T,) of finite samples, T > 0.

    names: of the measures that are wanted; None for all.
    """
    wanted = [each for each in AUDIO_MEASURES if names is None or each.name in names]
    return measure_all(wanted, ClipAudio(wav, sample_rate))


def _clipping_ratio(clip: ClipAudio) -> float:
    """Return the share of samples on flat tops.

    These are four or more neighbours nearly equal, near the clip's own highest (or lowest) value,
    with steep flanks, and more than one such top at that height.
    """
    return (_flat_samples(clip.wav) + _flat_samples(-clip.wav)) / len(clip.wav)


def _flat_samples(wav: Array) -> int:
    """Count the samples on flat tops of the upper side."""
    peak = float(wav.max())
    if peak <= 0:
        return 0
    near = np.flatnonzero(wav >= _LOWEST_TOP * peak)
    near = near[:-1][np.diff(near) == 1]  # both k and k + 1 are near the peak
    steps = np.abs(wav[near + 1] - wav[near])
    edges = np.zeros(len(wav) + 1, dtype=np.int32)  # +1 where a top begins, -1 after it
    for flatness in _FLATNESS:
        # The tops of a quiet clip are flat to a step of its integers.
        tolerance = max(flatness * peak, 1.01 * PCM_16_STEP)
        starts, ends = _tops(wav, near[steps <= tolerance], _STEEPNESS * tolerance)
        np.add.at(edges, starts, 1)
        np.add.at(edges, ends + 1, -1)
    return int(np.count_nonzero(np.cumsum(edges)))


def _tops(
    wav: Array, flat: NDArray[np.intp], steep: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first and last samples of flat tops.

    flat: every k where wav[k] is about wav[k + 1].
    """
    gap = np.flatnonzero(np.diff(flat) > 1)
    starts = flat[np.concatenate([[0], gap + 1])] if len(flat) else flat
    ends = flat[np.concatenate([gap, [len(flat) - 1]])] + 1 if len(flat) else flat
    inside = (starts >= 2) & (ends < len(wav) - 2) & (ends - starts + 1 >= _SHORTEST_TOP_SAMPLES)
    starts, ends = starts[inside], ends[inside]
    rise = np.maximum(wav[starts] - wav[starts - 1], wav[starts - 1] - wav[starts - 2])
    fall = np.maximum(wav[ends] - wav[ends + 1], wav[ends + 1] - wav[ends + 2])
    steep_flanks = np.minimum(rise, fall) >= steep
    starts, ends = starts[steep_flanks], ends[steep_flanks]
    if len(starts) < 2:
        return starts[:0], ends[:0]

    levels = wav[(starts + ends) // 2]
    by_level = np.argsort(levels, kind="stable")
    ranked = levels[by_level]
    lengths = np.concatenate([[0], np.cumsum((ends - starts)[by_level])])
    reach = np.searchsorted(ranked, ranked * _LEVEL_SPREAD, side="right")
    lowest = int(np.argmax(lengths[reach] - lengths[:-1]))  # of the height where most tops are
    alike = by_level[lowest : reach[lowest]]
    return (starts[alike], ends[alike]) if len(alike) > 1 else (starts[:0], ends[:0])


def _silence_ratio(clip: ClipAudio) -> float:
    wav = clip.wav
    frame = max(1, round(_SILENCE_FRAME_S * clip.sample_rate))
    whole = len(wav) // frame * frame
    energy = np.mean(np.square(wav[:whole].reshape(-1, frame)), axis=1, dtype=np.float64)
    if whole < len(wav):
        energy = np.append(energy, np.mean(np.square(wav[whole:]), dtype=np.float64))
    loudest = float(energy.max())
    silent = max(loudest * _ratio(-_SILENCE_BELOW_LOUDEST_DB), _ratio(_SILENCE_DBFS))
    return float(np.mean(energy < silent))


def _ratio(db: float) -> float:
    return math.pow(10, db / 10)


def _power_spectra(wav: Array, sample_rate: int) -> NDArray[np.float32]:
    """Return (F, K), of half overlapping Hann windows of about 50 ms; the mean is removed first."""
    from scipy import fft

    n_fft = 2 ** round(math.log2(sample_rate / 20))
    centred = wav - wav.mean(dtype=np.float64).astype(np.float32)
    if len(centred) < n_fft:
        centred = np.pad(centred, (0, n_fft - len(centred)))
    frames = np.lib.stride_tricks.sliding_window_view(centred, n_fft)[:: n_fft // 2]
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    spectra = fft.rfft(frames * window, axis=1)
    power: NDArray[np.float32] = np.square(spectra.real) + np.square(spectra.imag)
    return power


def _snr_db(clip: ClipAudio) -> float:
    """Return the energy above the noise over that of the noise, -20 to 100 dB; 0 for silence.

    The noise of each band of 1 kHz is taken from the tenth of its time-frequency points that holds
    least, as if it were white in the band, so neither pauses nor steady tones mislead it. Noise
    that falls steeply within a band (rumble, pink noise near 0 dB) is underestimated.
    """
    power, sample_rate = clip.power, clip.sample_rate
    total = float(power.mean(axis=0, dtype=np.float64).sum())
    if total == 0:
        return 0.0
    n_bins = power.shape[1]
    n_bands = max(1, round(sample_rate / 2 / _NOISE_BAND_HZ))
    noise = 0.0
    for band in np.array_split(np.arange(n_bins), n_bands):
        points = power[:, band[0] : band[-1] + 1].ravel()
        rank = int(_NOISE_SHARE * len(points))
        # Power of Gaussian noise is exponentially distributed: a tenth lies below 0.105 means.
        least = np.partition(points, rank)[rank] / -math.log1p(-_NOISE_SHARE)
        noise += float(least) * len(band)
    lowest, highest = _SNR_RANGE_DB
    noise = max(noise, total * _ratio(-highest))
    signal = max(total - noise, noise * _ratio(lowest))
    return min(highest, 10 * math.log10(signal / noise))


def _bandwidth_hz(clip: ClipAudio) -> float:
    energy = np.cumsum(clip.power.sum(axis=0, dtype=np.float64))
    if energy[-1] == 0:
        return 0.0
    k = int(np.searchsorted(energy, _ENERGY_SHARE * energy[-1]))
    return k / (len(energy) - 1) * clip.sample_rate / 2


def _crest_db(clip: ClipAudio) -> float:
    """Return the crest factor. It is low where a limiter or clipping has flattened the peaks."""
    wav = clip.wav.astype(np.float64)
    peak = float(np.abs(wav).max())
    # Relative to the peak, so that the squares of a quiet clip do not underflow.
    return 0.0 if peak == 0 else max(0.0, -10 * math.log10(float(np.mean(np.square(wav / peak)))))


def _dc_offset(clip: ClipAudio) -> float:
    """Return the DC offset as a share of the peak: full scale would depend on the clip's gain."""
    peak = float(np.abs(clip.wav).max())
    return 0.0 if peak == 0 else abs(float(np.mean(clip.wav, dtype=np.float64))) / peak


AUDIO_MEASURES: tuple[Measure[ClipAudio], ...] = (
    Measure(
        name="clipping_ratio",
        unit="share",
        meaning="samples on flat tops",
        reason="clipping",
        since=1,
        measure=_clipping_ratio,
        limits=(Limit(key="max_clipping_ratio", lowest=0, highest=1),),
    ),
    Measure(
        name="silence_ratio",
        unit="share",
        meaning="frames of 20 ms more than 40 dB below the loudest one, or below -70 dBFS",
        reason="silence_ratio",
        since=1,
        measure=_silence_ratio,
        limits=(Limit(key="max_silence_ratio", lowest=0, highest=1),),
    ),
    Measure(
        name="snr_db",
        unit="dB",
        meaning="energy above the noise over energy of the noise, -20 to 100; 0 for silence",
        reason="snr",
        since=1,
        measure=_snr_db,
        limits=(Limit(key="min_snr_db"),),
    ),
    Measure(
        name="bandwidth_hz",
        unit="Hz",
        meaning="frequency below which 99 % of the energy lies, DC left out; 0 for silence",
        reason="bandwidth",
        since=1,
        measure=_bandwidth_hz,
        limits=(Limit(key="min_bandwidth_hz", lowest=0),),
    ),
    Measure(
        name="crest_db",
        unit="dB",
        meaning="highest absolute sample over the RMS; 3 for a sine, 0 for silence",
        reason="crest",
        since=3,
        measure=_crest_db,
        limits=(Limit(key="min_crest_db", lowest=0),),
    ),
    Measure(
        name="dc_offset",
        unit="share",
        meaning="absolute mean of the samples over the highest absolute sample; 0 for silence",
        reason="dc_offset",
        since=3,
        measure=_dc_offset,
        limits=(Limit(key="max_dc_offset", lowest=0, highest=1),),
    ),
)
