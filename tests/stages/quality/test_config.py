"""Declarations of measures, and what follows from them: limits, their ranges and reasons."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields

import pytest

from stages.quality import (
    AUDIO_MEASURES,
    MEASURES,
    PITCH_MEASURES,
    Limit,
    Measure,
    QualityConfig,
    unwanted,
    unwanted_pitch,
)

# Words in shards that exist: key of the limit, its measure, and the reason in ledgers.
STORED_WORDS = [
    ("max_clipping_ratio", "clipping_ratio", "clipping"),
    ("max_silence_ratio", "silence_ratio", "silence_ratio"),
    ("min_snr_db", "snr_db", "snr"),
    ("min_bandwidth_hz", "bandwidth_hz", "bandwidth"),
    ("min_voiced_ratio", "voiced_ratio", "voiced_ratio"),
    ("max_octave_jump_rate", "octave_jump_rate", "octave_jumps"),
    ("max_second_voice", "second_voice", "second_voice"),
    ("min_pitch_hz", "f0_low_hz", "pitch_range"),
    ("max_pitch_hz", "f0_high_hz", "pitch_range"),
    ("max_pitch_range_semitones", "range_semitones", "pitch_range"),
]
LIMITS = [
    pytest.param(measure, limit, id=limit.key) for measure in MEASURES for limit in measure.limits
]


def reason_of(values: dict[str, float], config: QualityConfig) -> str | None:
    """Return the first reason of a voiced clip; values that are not given are harmless."""
    given = {measure.name: 0.5 for measure in MEASURES} | values
    return unwanted(given, config) or unwanted_pitch(given, config)


@pytest.mark.parametrize("key, name, reason", STORED_WORDS)
def test_words_that_shards_hold_stay(key: str, name: str, reason: str) -> None:
    (measure,) = [each for each in MEASURES if key in {limit.key for limit in each.limits}]
    assert (measure.name, measure.reason) == (name, reason)


def test_names_and_keys_are_unique_and_say_what_they_do() -> None:
    keys = [limit.key for measure in MEASURES for limit in measure.limits]
    names = [measure.name for measure in MEASURES]
    assert len(set(keys)) == len(keys) and len(set(names)) == len(names)
    assert all(key.startswith(("min_", "max_")) for key in keys)
    assert all(measure.meaning and measure.reason and measure.since >= 1 for measure in MEASURES)
    assert all(limit.below in (None, *keys) for measure in MEASURES for limit in measure.limits)


def test_the_settings_are_the_limits_and_all_are_off() -> None:
    assert [field.name for field in fields(QualityConfig)] == [
        limit.key for measure in MEASURES for limit in measure.limits
    ]
    assert all(getattr(QualityConfig(), field.name) is None for field in fields(QualityConfig))
    config = QualityConfig(min_snr_db=20.0)
    assert pickle.loads(pickle.dumps(config)) == config != QualityConfig()


def test_without_limits_all_is_kept() -> None:
    for worst in (-1e9, 1e9):
        values = {measure.name: worst for measure in MEASURES}
        assert reason_of(values, QualityConfig()) is None


@pytest.mark.parametrize("measure, limit", LIMITS)
def test_a_clip_at_a_limit_is_kept_and_one_beyond_is_not(
    measure: Measure[object], limit: Limit
) -> None:
    config = QualityConfig(**{limit.key: 0.5})
    beyond = 0.49 if limit.key.startswith("min_") else 0.51
    within = 0.51 if limit.key.startswith("min_") else 0.49
    assert reason_of({measure.name: 0.5}, config) is None
    assert reason_of({measure.name: within}, config) is None
    assert reason_of({measure.name: beyond}, config) == measure.reason


@pytest.mark.parametrize("measure, limit", LIMITS)
def test_a_limit_out_of_its_range_is_named(measure: Measure[object], limit: Limit) -> None:
    wrong = [math.nan, math.inf, -math.inf]
    for end, beyond in ((limit.lowest, -math.inf), (limit.highest, math.inf)):
        if math.isfinite(end):
            assert getattr(QualityConfig(**{limit.key: end}), limit.key) == end
            wrong.append(math.nextafter(end, beyond))
    for value in wrong:
        with pytest.raises(ValueError, match=rf"quality\.{limit.key} must (lie|be) .*, not "):
            QualityConfig(**{limit.key: value})


@pytest.mark.parametrize(
    "key", ["max_clipping_ratio", "max_silence_ratio", "min_voiced_ratio", "max_second_voice"]
)
def test_shares_go_from_0_to_1(key: str) -> None:
    for value in (-0.1, 50.0):
        with pytest.raises(ValueError, match=rf"quality\.{key} must lie between 0 and 1"):
            QualityConfig(**{key: value})


@pytest.mark.parametrize("key", ["min_bandwidth_hz", "max_octave_jump_rate", "min_pitch_hz"])
def test_frequencies_and_rates_are_not_negative(key: str) -> None:
    with pytest.raises(ValueError, match=rf"quality\.{key} must be 0 or more, not -0\.1"):
        QualityConfig(**{key: -0.1})


def test_the_limits_of_pitch_leave_a_range() -> None:
    QualityConfig(min_pitch_hz=80, max_pitch_hz=81)
    with pytest.raises(ValueError, match=r"quality\.min_pitch_hz \(80\) must lie below"):
        QualityConfig(min_pitch_hz=80, max_pitch_hz=80)


def test_a_clip_without_a_voice_is_left_out_for_that_alone() -> None:
    assert PITCH_MEASURES[0].name == "voiced_ratio"
    unvoiced = {measure.name: 0.0 for measure in PITCH_MEASURES}
    assert unwanted_pitch(unvoiced, QualityConfig(min_pitch_hz=80)) is None
    limits = QualityConfig(min_pitch_hz=80, min_voiced_ratio=0.1)
    assert unwanted_pitch(unvoiced, limits) == "voiced_ratio"
    voiced = unvoiced | {"voiced_ratio": 0.8, "f0_low_hz": 70.0}
    assert unwanted_pitch(voiced, limits) == "pitch_range"


def test_audio_comes_before_pitch() -> None:
    assert MEASURES == (*AUDIO_MEASURES, *PITCH_MEASURES)
