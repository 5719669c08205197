"""What may be done to a contour after it is estimated; each step is off unless it is asked for."""

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

_OCTAVE_TOLERANCE = 3.0  # semitones: vibrato and glides go on while the octave is wrong
_LONGEST_STRAY_S = 0.1  # a singer's leap lasts longer than an estimator's slip
_SHORT_GAP_S = 0.05  # neighbours beyond a longer gap tell nothing


@dataclass(frozen=True, kw_only=True)
class PostConfig:
    """Steps in the order in which they are taken.

    gate, gate_db: frames whose level lies below gate_db (dBFS) become unvoiced. "rms" is the level
      as it is, "a-weighted" as the ear weighs it (IEC 61672); `levels_db` says over what time.
    repair_octaves: stretches of at most 0.1 s that lie one or two octaves from both neighbours move
      back; a leap that stays is left alone.
    median_ms: a median over as much of each voiced run; whole odd numbers of frames.
    min_voiced_ms: shorter voiced runs become unvoiced.
    interpolate: unvoiced frames get the straight line in log f0 between their voiced neighbours,
      the ends are held; then no 0 is left to tell voiced from unvoiced.
    """

    gate: Literal["none", "rms", "a-weighted"] = field(default="none", metadata={"neutral": "none"})
    gate_db: float = -60.0
    repair_octaves: bool = False
    median_ms: float | None = None
    min_voiced_ms: float | None = None
    interpolate: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the key that is out of range."""
        if not -120 <= self.gate_db <= 0:
            raise ValueError(f"f0.gate_db must lie between -120 and 0 dBFS, not {self.gate_db}")
        for name in ("median_ms", "min_voiced_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1000:
                raise ValueError(f"f0.{name} must lie above 0 and up to 1000 ms, not {value}")


def refine(f0: Array, wav: Array, sample_rate: int, hop_length: int, cfg: PostConfig) -> Array:
    """The contour (F,) of a clip (T,) after the steps of `cfg`; float32 (F,).

    Frame i of f0 is the pitch in Hz at sample i * hop_length, 0 = unvoiced. Without any step it is
    the same array.
    """
    frame_s = hop_length / sample_rate
    if cfg.gate != "none":
        heard = weigh_a(wav, sample_rate) if cfg.gate == "a-weighted" else wav
        level = levels_db(heard, sample_rate, hop_length, len(f0))
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
    """RMS (n_frames,) of the 50 ms around each frame's sample in dB, 0 dB for a mean square of 1.

    So a sine of full scale is at -3 dBFS. The window counts only samples of the clip (T,); where it
    holds none the level is -inf.
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
    """A clip (T,) as loud as the ear finds it: A-weighting of IEC 61672-1, without phase."""
    from scipy import fft

    n_fft = fft.next_fast_len(len(wav) + round(_WEIGHTING_TAIL_S * sample_rate), real=True)
    spectrum = fft.rfft(wav, n_fft)
    spectrum *= a_weighting(fft.rfftfreq(n_fft, 1 / sample_rate)).astype(np.float32)
    weighed: Array = fft.irfft(spectrum, n_fft)[: len(wav)]
    return weighed


def a_weighting(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gain of A-weighting at frequencies of any shape: IEC 61672-1, annex E; 1 at 1 kHz."""
    square = np.square(hz)
    gain = 12194.217**2 * square * square
    gain /= (square + 20.598997**2) * (square + 12194.217**2)
    gain /= np.sqrt((square + 107.65265**2) * (square + 737.86223**2))
    weight: NDArray[np.float64] = gain * 10 ** (2.0 / 20)
    return weight


def repair_octaves(f0: Array, frame_s: float) -> Array:
    """A contour (F,) whose short stretches in a wrong octave are moved back; frame_s is a hop.

    A stretch of at most 0.1 s is moved when the steps into and out of it are the same number of
    octaves, one or two, in opposite directions, each to within three semitones. Neighbours may lie
    across an unvoiced gap of up to 50 ms.
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
        rise = octaves[into] - shift[into]  # from what came before, as repaired
        length_s = (voiced[out] - voiced[into + 1] + 1) * frame_s
        if rise == -octaves[out] and length_s <= _LONGEST_STRAY_S:
            shift[into + 1 : out + 1] = -rise
    repaired = f0.copy()
    repaired[voiced] *= np.exp2(shift).astype(np.float32)
    return repaired


def median_of_runs(f0: Array, window_frames: int) -> Array:
    """A contour (F,) in which each voiced frame is the median of its run around it.

    window_frames is odd. Runs are mirrored at their ends, so every value is one of its own run, and
    gaps stay where they are.
    """
    half = window_frames // 2
    smooth = f0.copy()
    for start, stop in voiced_runs(f0):
        mirrored = np.pad(f0[start:stop], half, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, window_frames)
        smooth[start:stop] = np.median(windows, axis=1)
    return smooth


def drop_short_runs(f0: Array, min_frames: float) -> Array:
    """A contour (F,) whose voiced runs of fewer than `min_frames` are unvoiced."""
    kept = f0.copy()
    for start, stop in voiced_runs(f0):
        if stop - start < min_frames:
            kept[start:stop] = 0
    return kept


def interpolate_gaps(f0: Array) -> Array:
    """A contour (F,) without unvoiced frames: straight lines in log f0 across gaps, ends held.

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
    """Spans [start, stop) of voiced frames of a contour (F,), in order."""
    edges = np.flatnonzero(np.diff(f0 > 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _nearest_odd(frames: float) -> int:
    return 2 * round((frames - 1) / 2) + 1
