"""Measures of a clip's pitch: voicing, octave jumps, range, and a second voice beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stages.f0.pitch import f0_to_pitch
from stages.quality.measure import Limit, Measure, measure_all
from stages.quality.second_voice import EARLIER_RULES, second_voice
from stages.types import Array

_JUMP_SEMITONES = 10.0  # no voice glides as far from one frame to the next
_RANGE_PERCENTILES = (5, 95)


@dataclass(frozen=True, eq=False)
class ClipPitch:
    """A clip (T,) of finite samples, and its contour (F,) in Hz with 0 where unvoiced.

    Frame i is the pitch at sample i * hop_length.
    """

    wav: Array
    sample_rate: int
    f0: Array
    hop_length: int

    @cached_property
    def range_hz(self) -> tuple[float, float]:
        """5th and 95th percentile of the voiced frames."""
        low, high = np.percentile(self.f0[self.f0 > 0], _RANGE_PERCENTILES)
        return float(low), float(high)


def measure_pitch(
    wav: Array, sample_rate: int, f0: Array, hop_length: int, version: int | None = None
) -> dict[str, float]:
    """Return the value of each of `PITCH_MEASURES`; all are 0 where no frame is voiced.

    wav: (T,), finite. f0: (F,) Hz, 0 = unvoiced; frame i is at sample i * hop_length.
    version: the schema version whose measures are wanted; None: the present one.
    """
    if not np.any(f0 > 0):
        return {measure.name: 0.0 for measure in PITCH_MEASURES}
    return measure_all(PITCH_MEASURES, ClipPitch(wav, sample_rate, f0, hop_length), version)


def _octave_jump_rate(clip: ClipPitch) -> float:
    """Return the jumps in a second of voiced frames.

    A singer's leap of an octave within a run counts once, a stretch in the wrong octave twice;
    across an unvoiced frame nothing counts.
    """
    voiced_s = np.count_nonzero(clip.f0 > 0) * clip.hop_length / clip.sample_rate
    return octave_jumps(clip.f0) / voiced_s


def _range_semitones(clip: ClipPitch) -> float:
    low, high = clip.range_hz
    return 12 * math.log2(high / low)


def voiced_ratio(f0: Array) -> float:
    """Return the share of frames (F,) that are voiced; 0 where there are none."""
    return float(np.mean(f0 > 0)) if len(f0) else 0.0


def octave_jumps(f0: Array) -> int:
    """Count neighbouring voiced frames of a contour (F,) that lie ten semitones or more apart."""
    step = np.abs(np.diff(f0_to_pitch(f0)))  # NaN beside an unvoiced frame, and no comparison holds
    return int(np.count_nonzero(step >= _JUMP_SEMITONES))


# `voiced_ratio` is the first: the others say nothing about a clip without a voiced frame.
PITCH_MEASURES: tuple[Measure[ClipPitch], ...] = (
    Measure(
        name="voiced_ratio",
        unit="share",
        meaning="f0 frames that are voiced",
        reason="voiced_ratio",
        since=1,
        measure=lambda clip: voiced_ratio(clip.f0),
        limits=(Limit(key="min_voiced_ratio", lowest=0, highest=1),),
    ),
    Measure(
        name="octave_jump_rate",
        unit="1/s",
        meaning="jumps of ten semitones or more between neighbouring voiced frames, "
        "per second of voice",
        reason="octave_jumps",
        since=2,
        measure=_octave_jump_rate,
        limits=(Limit(key="max_octave_jump_rate", lowest=0),),
    ),
    Measure(
        name="second_voice",
        unit="",
        meaning="suspicion from 0 to 1 that another voice or an instrument sounds too; 0.5 is "
        "where to draw the line",
        reason="second_voice",
        since=2,
        measure=lambda clip: second_voice(clip.wav, clip.sample_rate, clip.f0, clip.hop_length),
        changed=4,
        earlier=lambda clip: second_voice(
            clip.wav, clip.sample_rate, clip.f0, clip.hop_length, EARLIER_RULES
        ),
        limits=(Limit(key="max_second_voice", lowest=0, highest=1),),
    ),
    Measure(
        name="f0_low_hz",
        unit="Hz",
        meaning="5th percentile of f0 over the voiced frames",
        reason="pitch_range",
        since=2,
        measure=lambda clip: clip.range_hz[0],
        limits=(Limit(key="min_pitch_hz", lowest=0, below="max_pitch_hz"),),
    ),
    Measure(
        name="f0_high_hz",
        unit="Hz",
        meaning="95th percentile of f0 over the voiced frames",
        reason="pitch_range",
        since=2,
        measure=lambda clip: clip.range_hz[1],
        limits=(Limit(key="max_pitch_hz", lowest=0),),
    ),
    Measure(
        name="range_semitones",
        unit="semitones",
        meaning="distance from f0_low_hz to f0_high_hz",
        reason="pitch_range",
        since=2,
        measure=_range_semitones,
        limits=(Limit(key="max_pitch_range_semitones", lowest=0),),
        stored=False,
    ),
)
