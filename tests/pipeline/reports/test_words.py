"""Words for numbers, notes and reasons."""

from __future__ import annotations

import math

import pytest

from pipeline.reports.words import (
    measure_in_words,
    midi_to_hz,
    note_name,
    number_in_words,
    reason_in_words,
    seconds_in_words,
)
from stages.errors import Reason


@pytest.mark.parametrize(
    ("seconds", "words"), [(59.94, "59.9 s"), (60, "1.0 min"), (3600, "1.00 h"), (9000, "2.50 h")]
)
def test_durations_have_a_fitting_unit(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words


def test_numbers_that_are_not_finite_are_a_dash() -> None:
    assert number_in_words(0.123, ".0%") == "12%"
    assert number_in_words(1.5, "+.1f", " dB") == "+1.5 dB"
    assert {number_in_words(x, ".1f", " dB") for x in (math.nan, math.inf, -math.inf)} == {"–"}


def test_measures_have_three_digits_and_a_unit() -> None:
    assert measure_in_words(0.0049, "share") == "0.49%"
    assert measure_in_words(1.0, "share") == "100%"
    assert measure_in_words(12604.3, "Hz") == "12604 Hz"
    assert measure_in_words(40.16, "dB") == "40.2 dB"
    assert measure_in_words(-0.00123, "") == "-0.00123"
    assert measure_in_words(0.0, "1/s") == "0 1/s"


def test_notes_are_named_by_their_pitch() -> None:
    assert [note_name(midi) for midi in (69, 60, 59.6, 58.4, 0)] == ["A4", "C4", "C4", "A♯3", "C-1"]
    assert midi_to_hz(69) == 440 and midi_to_hz(57) == 220


def test_every_reason_has_words() -> None:
    assert reason_in_words(Reason.NO_PERMISSION) == "no permission"
    assert not any("_" in reason_in_words(reason) for reason in Reason)
