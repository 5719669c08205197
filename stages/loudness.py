"""Loudness of a song, and the gain that brings it to the target.

Loudness and true peak follow ITU-R BS.1770-4. Both are measured in blocks, so memory does not grow
with the song.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.signal import sosfilt

from stages.types import Array, Samples

GATING_BLOCK_S = 0.4
GATING_STEP = 0.25  # of a block: blocks overlap by 75 %
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
READ_STEPS = 40  # gating steps filtered at a time: 4 s

OVERSAMPLING = 4
HALF_TAPS = 12  # samples on each side of an interpolated point
PEAK_BLOCK_SAMPLES = 1024
READ_PEAK_BLOCKS = 256


@dataclass(frozen=True, kw_only=True)
class LoudnessConfig:
    """Settings of loudness normalisation.

    mode: "lufs" = integrated loudness `target_lufs`, with the gain lowered until the true peak is
    at most `true_peak_db`; "peak" = the largest sample becomes 1.0, as in so-vits-svc's
    resample.py; "none" = measure only. per: one gain for a song, or one for each of its clips.
    """

    mode: Literal["lufs", "peak", "none"] = "lufs"
    target_lufs: float = -18.0
    true_peak_db: float = -1.0
    per: Literal["song", "clip"] = "song"

    def __post_init__(self) -> None:
        if not -70.0 <= self.target_lufs <= 0.0:
            raise ValueError(
                f"loudness.target_lufs is {self.target_lufs}; it must lie in -70 to 0 LUFS"
            )
        if not -70.0 <= self.true_peak_db <= 0.0:
            raise ValueError(
                f"loudness.true_peak_db is {self.true_peak_db}; it must lie in -70 to 0 dBTP"
            )


@dataclass(frozen=True)
class LoudnessReading:
    """Levels before the gain. `note` explains a missing loudness; else it is empty."""

    loudness_lufs: float  # integrated; nan when there is none
    peak_db: float  # true peak in dBTP; -inf for digital silence
    gain_db: float  # to apply
    note: str


def measure_loudness(wav: Samples, sample_rate: int, cfg: LoudnessConfig) -> LoudnessReading:
    """Measure loudness and true peak of `wav` (T,) and compute the gain for `cfg`.

    Input that is too short or too quiet for a loudness (under 0.4 s; no block above -70 LUFS) keeps
    its level in mode "lufs" (0 dB). Digital silence keeps its level in mode "peak".
    """
    loudness = integrated_loudness(wav, sample_rate)
    sample_peak, true_peak = peaks(wav)
    peak_db = _db(true_peak)
    note = ""
    if math.isnan(loudness):
        seconds = len(wav) / sample_rate
        too_short = len(wav) < GATING_BLOCK_S * sample_rate
        why = f"{seconds:.3f} s is too short" if too_short else "it is silent (below -70 LUFS)"
        note = f"no loudness reading: {why}"
    gain_db = 0.0
    if cfg.mode == "lufs" and not math.isnan(loudness):
        gain_db = min(cfg.target_lufs - loudness, cfg.true_peak_db - peak_db)
    elif cfg.mode == "peak" and sample_peak > 0.0:
        gain_db = -_db(sample_peak)
    return LoudnessReading(loudness, peak_db, gain_db, note)


def apply_gain(wav: Array, gain_db: float) -> Array:
    """Multiply samples (T,) by the gain, rounding once to float32."""
    return (wav * np.float64(10.0 ** (gain_db / 20.0))).astype(np.float32)


def integrated_loudness(wav: Samples, sample_rate: int, *, read_steps: int = READ_STEPS) -> float:
    """Measure the gated loudness of mono `wav` (T,) in LUFS; nan when it has none.

    Equals pyloudnorm's `Meter.integrated_loudness` (BS.1770-4, eq. 1 to 7), which needs the whole
    song in memory. The result is bit-identical for every `read_steps`.
    """
    if len(wav) < GATING_BLOCK_S * sample_rate:
        return math.nan
    power = _gating_block_power(wav, sample_rate, read_steps)
    with np.errstate(divide="ignore"):
        loudness = -0.691 + 10.0 * np.log10(power)
    audible = loudness >= ABSOLUTE_GATE_LUFS
    if not audible.any():
        return math.nan
    relative_gate = -0.691 + 10.0 * math.log10(power[audible].mean()) + RELATIVE_GATE_LU
    foreground = (loudness > relative_gate) & (loudness > ABSOLUTE_GATE_LUFS)
    if not foreground.any():
        return math.nan
    return -0.691 + 10.0 * math.log10(power[foreground].mean())


def peaks(wav: Samples) -> tuple[float, float]:
    """Measure sample peak and true peak of `wav` (T,), linear; (0, 0) for silence.

    The true peak is the largest magnitude after four-fold oversampling (BS.1770-4, annex 2), with
    zeros before and after the song. Only stretches that can exceed the highest peak so far are
    interpolated; the bound |sum h x| <= sum |h| * max |x| makes this exact.
    """
    block_peaks = _block_peaks(wav)
    sample_peak = highest = float(block_peaks.max())
    around = np.pad(block_peaks, 1)
    around = np.maximum(np.maximum(around[:-2], around[1:-1]), around[2:])
    bounds = around * np.abs(_INTERPOLATOR).sum(axis=1).max()
    for k in np.argsort(-bounds, kind="stable").tolist():
        if bounds[k] <= highest:
            break
        start = k * PEAK_BLOCK_SAMPLES - HALF_TAPS
        stop = start + PEAK_BLOCK_SAMPLES
        piece = _read_padded(wav, start - HALF_TAPS + 1, stop + HALF_TAPS)
        for taps in _INTERPOLATOR:
            highest = max(highest, float(np.abs(np.correlate(piece, taps)).max()))
    return sample_peak, highest


def _block_peaks(wav: Samples) -> NDArray[np.float64]:
    """Return the peak of each PEAK_BLOCK_SAMPLES, from HALF_TAPS before the song to after it."""
    num_blocks = -(-(len(wav) + 2 * HALF_TAPS) // PEAK_BLOCK_SAMPLES)
    block_peaks = np.empty(num_blocks)
    for first in range(0, num_blocks, READ_PEAK_BLOCKS):
        last = min(first + READ_PEAK_BLOCKS, num_blocks)
        start, stop = first * PEAK_BLOCK_SAMPLES, last * PEAK_BLOCK_SAMPLES
        piece = _read_padded(wav, start - HALF_TAPS, stop - HALF_TAPS)
        block_peaks[first:last] = np.abs(piece).reshape(-1, PEAK_BLOCK_SAMPLES).max(axis=1)
    return block_peaks


def _read_padded(wav: Samples, start: int, stop: int) -> NDArray[np.float64]:
    """Read samples [start, stop), with zeros before and after the song."""
    piece = np.zeros(stop - start)
    inside = wav[max(0, start) : max(0, stop)]
    lead = max(0, -start)
    piece[lead : lead + len(inside)] = inside
    return piece


def _interpolator() -> NDArray[np.float64]:
    """Build the taps (3, 2 * HALF_TAPS) for points 1/4, 1/2 and 3/4 of the way to the next sample.

    Sinc with a Kaiser window (beta 3.4), unity gain at 0 Hz; within 0.15 dB up to 0.45 of the
    sample rate (20 kHz at 44.1 kHz). Column c weighs the sample that lies c - HALF_TAPS + 1 after
    the point's left neighbour.
    """
    points = np.arange(1, OVERSAMPLING)[:, None] / OVERSAMPLING
    distance = points - np.arange(1 - HALF_TAPS, 1 + HALF_TAPS)
    window = np.i0(3.4 * np.sqrt(1.0 - (distance / HALF_TAPS) ** 2))
    taps = np.sinc(distance) * window
    return np.asarray(taps / taps.sum(axis=1, keepdims=True))


_INTERPOLATOR = _interpolator()


def _gating_block_power(wav: Samples, sample_rate: int, read_steps: int) -> NDArray[np.float64]:
    """Return the mean square of the K-weighted song per 400 ms block (BS.1770-4, eq. 1 and 3)."""
    duration_s = len(wav) / sample_rate
    step_s = GATING_BLOCK_S * GATING_STEP
    index = np.arange(int(np.round((duration_s - GATING_BLOCK_S) / step_s)) + 1)
    # The order of operations is pyloudnorm's, so that block boundaries round the same way.
    starts = (GATING_BLOCK_S * (index * GATING_STEP) * sample_rate).astype(np.int64)
    stops = (GATING_BLOCK_S * (index * GATING_STEP + 1) * sample_rate).astype(np.int64)
    stops = np.minimum(stops, len(wav))
    edges = np.unique(np.concatenate([starts, stops]))
    sections = _k_weighting(sample_rate)
    state = np.zeros((len(sections), 2))
    energy = np.zeros(len(edges))  # between an edge and the next; the last stays 0
    for first in range(0, len(edges) - 1, read_steps):
        last = min(first + read_steps, len(edges) - 1)
        piece = wav[int(edges[first]) : int(edges[last])].astype(np.float64)
        weighted, state = sosfilt(sections, piece, zi=state)
        energy[first:last] = np.add.reduceat(weighted**2, edges[first:last] - edges[first])
    bounds = np.searchsorted(edges, np.stack([starts, stops], axis=1))
    sums = np.add.reduceat(energy, bounds.reshape(-1))[::2]
    return np.asarray(sums / (GATING_BLOCK_S * sample_rate))


def _k_weighting(sample_rate: int) -> NDArray[np.float64]:
    """Return the K-weighting filter as second-order sections (2, 6).

    A shelf of +4 dB above 1.5 kHz, then a high-pass at 38 Hz: pyloudnorm's analogue prototypes of
    the two filters of BS.1770-4, by the formulas of R. Bristow-Johnson's Audio EQ Cookbook.
    """
    gain = 10.0 ** (4.0 / 40.0)
    angle = 2.0 * math.pi * 1500.0 / sample_rate
    cos, alpha = math.cos(angle), math.sin(angle) / math.sqrt(2.0)
    slope = 2.0 * math.sqrt(gain) * alpha
    up, down = gain + 1.0, gain - 1.0
    shelf = [
        gain * (up + down * cos + slope),
        -2.0 * gain * (down + up * cos),
        gain * (up + down * cos - slope),
        up - down * cos + slope,
        2.0 * (down - up * cos),
        up - down * cos - slope,
    ]
    angle = 2.0 * math.pi * 38.0 / sample_rate
    cos, alpha = math.cos(angle), math.sin(angle)
    high_pass = [
        (1.0 + cos) / 2.0,
        -(1.0 + cos),
        (1.0 + cos) / 2.0,
        1.0 + alpha,
        -2.0 * cos,
        1.0 - alpha,
    ]
    return np.array([np.divide(section, section[3]) for section in (shelf, high_pass)])


def _db(magnitude: float) -> float:
    return 20.0 * math.log10(magnitude) if magnitude > 0.0 else -math.inf
