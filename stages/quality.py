"""What a clip is worth: clipping, silence, noise, bandwidth, and limits on every measure of clips.

Every measure ignores the level of the clip, since songs change level before clips exist: a
recording that clipped at full scale and was then turned down still counts. What the pitch tells of
a clip is in `stages.pitch_quality`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.errors import Reason
from stages.types import Array

PCM_16_STEP = 1 / 32768

# A flat top: what follows was chosen on 11 recordings of singing and speech. It finds at most 2 in
# 10,000 samples of any 5 s of them as they are; with their highest 1 % clipped, 68 to 100 % of the
# clipped samples; with that resampled, which makes flat tops ring, 42 to 90 %.
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


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Limits beyond which a clip is left out; None keeps all.

    `Quality` and `stages.pitch_quality.PitchQuality` say what is measured. min_pitch_hz limits
    f0_low_hz and max_pitch_hz f0_high_hz; max_pitch_range_semitones is from the one to the other.
    """

    max_clipping_ratio: float | None = None
    max_silence_ratio: float | None = None
    min_snr_db: float | None = None
    min_bandwidth_hz: float | None = None
    min_voiced_ratio: float | None = None
    max_octave_jump_rate: float | None = None
    max_second_voice: float | None = None
    min_pitch_hz: float | None = None
    max_pitch_hz: float | None = None
    max_pitch_range_semitones: float | None = None

    def __post_init__(self) -> None:
        shares = ("max_clipping_ratio", "max_silence_ratio", "min_voiced_ratio", "max_second_voice")
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"quality.{name} must lie between 0 and 1, not {value}")
        if self.min_snr_db is not None and not math.isfinite(self.min_snr_db):
            raise ValueError(f"quality.min_snr_db must be a number of dB, not {self.min_snr_db}")
        for name in (
            "min_bandwidth_hz",
            "max_octave_jump_rate",
            "min_pitch_hz",
            "max_pitch_hz",
            "max_pitch_range_semitones",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"quality.{name} must not be negative, not {value}")
        if (
            self.min_pitch_hz is not None
            and self.max_pitch_hz is not None
            and not self.min_pitch_hz < self.max_pitch_hz
        ):
            raise ValueError(
                f"quality.min_pitch_hz ({self.min_pitch_hz}) must lie below "
                f"quality.max_pitch_hz ({self.max_pitch_hz})"
            )


@dataclass(frozen=True)
class Quality:
    """Measures of one clip; all finite.

    clipping_ratio: share of samples on flat tops: four or more neighbours nearly equal, near the
      clip's own highest (or lowest) value, with steep flanks, and more than one at that height.
    silence_ratio: share of 20 ms frames more than 40 dB below the loudest one, or below -70 dBFS.
    snr_db: energy above the noise over energy of the noise, -20 to 100 dB; 0 for digital silence.
      The noise of each band of 1 kHz is taken from the tenth of its time-frequency points that
      holds least, as if it were white in the band, so neither pauses nor steady tones mislead it;
      what falls steeply within a band (rumble, pink noise near 0 dB) is underestimated.
    bandwidth_hz: frequency below which 99 % of the energy lies, DC left out; 0 for silence.
    """

    clipping_ratio: float
    silence_ratio: float
    snr_db: float
    bandwidth_hz: float


def measure_quality(wav: Array, sample_rate: int) -> Quality:
    """Measures of a clip (T,) of finite samples, T > 0."""
    power = _power_spectra(wav, sample_rate)
    return Quality(
        clipping_ratio=(_flat_samples(wav) + _flat_samples(-wav)) / len(wav),
        silence_ratio=_silence_ratio(wav, sample_rate),
        snr_db=_snr_db(power, sample_rate),
        bandwidth_hz=_bandwidth_hz(power, sample_rate),
    )


class Limit(NamedTuple):
    """What a measure may be; None sets no limit."""

    value: float
    reason: Reason
    least: float | None = None
    most: float | None = None


def unwanted(quality: Quality, cfg: QualityConfig) -> Reason | None:
    """Why a clip of this quality is left out; None where it is kept."""
    return first_beyond(
        [
            Limit(quality.clipping_ratio, Reason.CLIPPING, most=cfg.max_clipping_ratio),
            Limit(quality.silence_ratio, Reason.SILENCE_RATIO, most=cfg.max_silence_ratio),
            Limit(quality.snr_db, Reason.SNR, least=cfg.min_snr_db),
            Limit(quality.bandwidth_hz, Reason.BANDWIDTH, least=cfg.min_bandwidth_hz),
        ]
    )


def first_beyond(limits: Iterable[Limit]) -> Reason | None:
    """The reason of the first measure that lies beyond its limits; None where none does."""
    for value, reason, least, most in limits:
        if (least is not None and value < least) or (most is not None and value > most):
            return reason
    return None


def _flat_samples(wav: Array) -> int:
    """Samples on the flat tops of the upper side."""
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
    """First and last samples of flat tops; `flat` lists the k where wav[k] is about wav[k + 1]."""
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


def _silence_ratio(wav: Array, sample_rate: int) -> float:
    frame = max(1, round(_SILENCE_FRAME_S * sample_rate))
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
    """(F, K): Hann windows of about 50 ms, half overlapping, of the clip without its mean."""
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


def _snr_db(power: NDArray[np.float32], sample_rate: int) -> float:
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


def _bandwidth_hz(power: NDArray[np.float32], sample_rate: int) -> float:
    energy = np.cumsum(power.sum(axis=0, dtype=np.float64))
    if energy[-1] == 0:
        return 0.0
    k = int(np.searchsorted(energy, _ENERGY_SHARE * energy[-1]))
    return k / (len(energy) - 1) * sample_rate / 2
