"""What the pitch tells of a clip: voicing, octave jumps, range, and a second voice beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stages.errors import Reason
from stages.f0.pitch import f0_to_pitch
from stages.quality import Limit, QualityConfig, first_beyond
from stages.second_voice import second_voice
from stages.types import Array

_JUMP_SEMITONES = 10.0  # no voice glides as far from one frame to the next
_RANGE_PERCENTILES = (5, 95)


@dataclass(frozen=True)
class PitchQuality:
    """Measures of one clip and its contour; all finite, all 0 where no frame is voiced.

    voiced_ratio: share of f0 frames that are voiced.
    octave_jump_rate: jumps per second of voiced frames: ten semitones or more, up or down, from one
      voiced frame to the next frame. A singer's leap of an octave within a run counts once, a
      stretch in the wrong octave twice; across an unvoiced frame nothing counts.
    second_voice: suspicion from 0 to 1 that another voice or an instrument sounds too; 0.5 is where
      to draw the line (`stages.second_voice` says what it finds there).
    f0_low_hz, f0_high_hz: 5th and 95th percentile of the voiced frames.
    """

    voiced_ratio: float
    octave_jump_rate: float
    second_voice: float
    f0_low_hz: float
    f0_high_hz: float

    @property
    def range_semitones(self) -> float:
        """From the low to the high end; 0 where no frame is voiced."""
        if self.f0_low_hz == 0:
            return 0.0
        return 12 * math.log2(self.f0_high_hz / self.f0_low_hz)


def measure_pitch(wav: Array, sample_rate: int, f0: Array, hop_length: int) -> PitchQuality:
    """Measures of a clip (T,) of finite samples whose frame i of `f0` (F,) is at i * hop_length.

    f0: Hz, 0 = unvoiced.
    """
    voiced = f0[f0 > 0]
    if len(voiced) == 0:
        return PitchQuality(0.0, 0.0, 0.0, 0.0, 0.0)
    low, high = np.percentile(voiced, _RANGE_PERCENTILES)
    voiced_s = len(voiced) * hop_length / sample_rate
    return PitchQuality(
        voiced_ratio=voiced_ratio(f0),
        octave_jump_rate=octave_jumps(f0) / voiced_s,
        second_voice=second_voice(wav, sample_rate, f0, hop_length),
        f0_low_hz=float(low),
        f0_high_hz=float(high),
    )


def unwanted_pitch(quality: PitchQuality, cfg: QualityConfig) -> Reason | None:
    """Why a clip of this pitch is left out; None where it is kept.

    A clip without a voiced frame has no pitch: only `min_voiced_ratio` leaves it out.
    """
    voicing = Limit(quality.voiced_ratio, Reason.VOICED_RATIO, least=cfg.min_voiced_ratio)
    if quality.voiced_ratio == 0:
        return first_beyond([voicing])
    return first_beyond(
        [
            voicing,
            Limit(quality.octave_jump_rate, Reason.OCTAVE_JUMPS, most=cfg.max_octave_jump_rate),
            Limit(quality.second_voice, Reason.SECOND_VOICE, most=cfg.max_second_voice),
            Limit(quality.f0_low_hz, Reason.PITCH_RANGE, least=cfg.min_pitch_hz),
            Limit(quality.f0_high_hz, Reason.PITCH_RANGE, most=cfg.max_pitch_hz),
            Limit(quality.range_semitones, Reason.PITCH_RANGE, most=cfg.max_pitch_range_semitones),
        ]
    )


def voiced_ratio(f0: Array) -> float:
    """Share of frames (F,) that are voiced; 0 where there are none."""
    return float(np.mean(f0 > 0)) if len(f0) else 0.0


def octave_jumps(f0: Array) -> int:
    """How often neighbouring voiced frames of a contour (F,) lie ten semitones or more apart."""
    step = np.abs(np.diff(f0_to_pitch(f0)))  # NaN beside an unvoiced frame, and no comparison holds
    return int(np.count_nonzero(step >= _JUMP_SEMITONES))
