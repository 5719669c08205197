"""Post-processing of a contour; every step is off by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.f0.pitch import f0_to_pitch
from stages.types import Array

_LEVEL_WINDOW_S = 0.05
_WEIGHTING_TAIL_S = 0.25  # by then the filter's impulse response is 100 dB down

_OCTAVE_TOLERANCE = 3.0  # semitones: vibrato and glides continue during an octave error
_LONGEST_STRAY_S = 0.1  # a singer's leap lasts longer than an octave error
_SHORT_GAP_S = 0.05  # neighbours across a longer gap are not compared


@dataclass(frozen=True, kw_only=True)
class PostConfig:
    """Settings of the post-processing, in the order of its steps.

    gate, gate_db: frames with a level below gate_db (dBFS) become unvoiced. "rms" is the plain
      level, "a-weighted" the level after A-weighting (IEC 61672), both over 50 ms (`levels_db`).
    repair_octaves: stretches of at most 0.1 s that lie one or two octaves from both neighbours are
      moved back; a lasting leap is kept.
    median_ms: width of a median filter over each voiced run; rounded to an odd number of frames.
    min_voiced_ms: shorter voiced runs become unvoiced.
    interpolate: unvoiced frames get the straight line in log f0 between their voiced neighbours,
      and the nearest value at the ends. No 0 is left then to tell voiced from unvoiced.
    """

    gate: Literal["none", "rms", "a-weighted"] = field(default="none", metadata={"neutral": "none"})
    gate_db: float = -60.0
    repair_octaves: bool = False
    median_ms: float | None = None
    min_voiced_ms: float | None = None
    interpolate: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises: ValueError: when a key is out of range (the message names it).
        """
        if not -120 <= self.gate_db <= 0:
            raise ValueError(f"f0.gate_db must be between -120 and 0 dBFS, not {self.gate_db}")
        for name in ("median_ms", "min_voiced_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1000:
                raise ValueError(f"f0.{name} must be above 0 and at most 1000 ms, not {value}")


def refine(f0: Array, wav: Array, sample_rate: int, hop_length: int, cfg: PostConfig) -> Array:
    """Apply the steps of `cfg` to the contour (F,) of a clip (T,); float32 (F,).

    Frame i of f0 is the pitch in Hz at sample i * hop_length, 0 = unvoiced. Without any step the
    same array is returned.
    """
    frame_s = hop_length / sample_rate
    if cfg.gate != "none":
        weighted = weigh_a(wav, sample_rate) if cfg.gate == "a-weighted" else wav
        level = levels_db(weighted, sample_rate, hop_length, len(f0))
        f0 = np.where(level >= cfg.gate_db, f0, np.float32(0))
    if cfg.repair_octaves:
        f0 = repair_octaves(f0, frame_s)
    if cfg.median_ms is not None:
        f0 = median_of_runs(f0, _nearest_odd(cfg.median_ms / 1000 / frame_s))
    if cfg.min_voiced_ms is not None:
        f0 = drop_short_runs(f0, cfg.min_voiced_ms / 1000 / frame_s)
    if cfg.interpolate:
        f0 = interpolate_gaps(f0)
    return f0


def levels_db(wav: Array, sample_rate: int, hop_length: int, n_frames: int) -> NDArray[np.float64]:
    """Measure the RMS (n_frames,) of the 50 ms around each frame in dB.

    0 dB is a mean square of 1, so a full-scale sine is at -3 dBFS. Only samples of the clip (T,)
    count; a window without any has the level -inf.
    """
    centre = np.arange(n_frames) * hop_length
    half = max(1, round(_LEVEL_WINDOW_S / 2 * sample_rate))
    start = np.clip(centre - half, 0, len(wav))
    stop = np.clip(centre + half, 0, len(wav))
    energy = np.append(np.square(wav, dtype=np.float64), 0.0)  # so that `stop` may be an index
    total = np.add.reduceat(energy, np.stack([start, stop], axis=1).ravel())[::2]
    mean = np.where(stop > start, total / np.maximum(stop - start, 1), 0.0)
    with np.errstate(divide="ignore"):
        level: NDArray[np.float64] = 10 * np.log10(mean)
    return level


def weigh_a(wav: Array, sample_rate: int) -> Array:
    """Apply A-weighting (IEC 61672-1) to a clip (T,), with zero phase."""
    from scipy import fft

    n_fft = fft.next_fast_len(len(wav) + round(_WEIGHTING_TAIL_S * sample_rate), real=True)
    spectrum = fft.rfft(wav, n_fft)
    spectrum *= a_weighting(fft.rfftfreq(n_fft, 1 / sample_rate)).astype(np.float32)
    weighed: Array = fft.irfft(spectrum, n_fft)[: len(wav)]
    return weighed


def a_weighting(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the A-weighting gain at frequencies of any shape: IEC 61672-1, annex E; 1 at 1 kHz."""
    square = np.square(hz)
    gain = 12194.217**2 * square * square
    gain /= (square + 20.598997**2) * (square + 12194.217**2)
    gain /= np.sqrt((square + 107.65265**2) * (square + 737.86223**2))
    weight: NDArray[np.float64] = gain * 10 ** (2.0 / 20)
    return weight


def repair_octaves(f0: Array, frame_s: float) -> Array:
    """Move short stretches in a wrong octave of a contour (F,) back; frame_s: the hop in seconds.

    A stretch of at most 0.1 s is moved when the steps into and out of it are the same number of
    octaves, one or two, in opposite directions, each to within three semitones. An unvoiced gap of
    up to 50 ms may lie between neighbours.
    """
    voiced = np.flatnonzero(f0 > 0)
    pitch = f0_to_pitch(f0[voiced])
    step = np.diff(pitch)
    octaves = np.round(step / 12).astype(int)
    octaves[np.abs(step - 12 * octaves) > _OCTAVE_TOLERANCE] = 0
    octaves[np.abs(octaves) > 2] = 0
    octaves[np.diff(voiced) - 1 > _SHORT_GAP_S / frame_s] = 0
    jumps = np.flatnonzero(octaves)  # jump k lies before the voiced frame k + 1

    shift = np.zeros(len(voiced), dtype=int)
    for into, out in pairwise(jumps):
        rise = octaves[into] - shift[into]  # from the repaired stretch before it
        length_s = (voiced[out] - voiced[into + 1] + 1) * frame_s
        if rise == -octaves[out] and length_s <= _LONGEST_STRAY_S:
            shift[into + 1 : out + 1] = -rise
    repaired = f0.copy()
    repaired[voiced] *= np.exp2(shift).astype(np.float32)
    return repaired


def median_of_runs(f0: Array, window_frames: int) -> Array:
    """Apply a median filter to each voiced run of a contour (F,).

    window_frames is odd. Runs are mirrored at their ends, so every value is one of its own run, and
    gaps do not move.
    """
    half = window_frames // 2
    smooth = f0.copy()
    for start, stop in voiced_runs(f0):
        mirrored = np.pad(f0[start:stop], half, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, window_frames)
        smooth[start:stop] = np.median(windows, axis=1)
    return smooth


def drop_short_runs(f0: Array, min_frames: float) -> Array:
    """Mark voiced runs of fewer than `min_frames` frames of a contour (F,) as unvoiced."""
    kept = f0.copy()
    for start, stop in voiced_runs(f0):
        if stop - start < min_frames:
            kept[start:stop] = 0
    return kept


def interpolate_gaps(f0: Array) -> Array:
    """Fill the unvoiced frames of a contour (F,), linearly in log f0; the ends keep the last value.

    Voiced frames keep their values. A contour without a voiced frame stays 0.
    """
    voiced = np.flatnonzero(f0 > 0)
    if len(voiced) == 0:
        return f0
    gaps = np.flatnonzero(f0 <= 0)
    filled = f0.copy()
    filled[gaps] = np.exp2(np.interp(gaps, voiced, np.log2(f0[voiced].astype(np.float64))))
    return filled


def voiced_runs(f0: Array) -> list[tuple[int, int]]:
    """Return the spans [start, stop) of voiced frames of a contour (F,), in order."""
    edges = np.flatnonzero(np.diff(f0 > 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _nearest_odd(frames: float) -> int:
    return 2 * round((frames - 1) / 2) + 1
