"""Numbers, durations, notes and reasons as a page shows them."""

from __future__ import annotations

import math

_NOTES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")


def number_in_words(value: float, form: str, unit: str = "") -> str:
    """Return `value` by the format specification `form`, an en dash when it is not finite."""
    return format(value, form) + unit if math.isfinite(value) else "–"


def measure_in_words(value: float, unit: str) -> str:
    """Return a value with its unit, a `share` in percent: `40.2 dB`, `0.49%`, `12604 Hz`."""
    if unit == "share":
        value, unit = 100 * value, "%"
    form = ".0f" if abs(value) >= 100 else ".3g"
    return number_in_words(value, form, unit if unit in ("", "%") else f" {unit}")


def seconds_in_words(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours: `12.0 s`, `3.1 min`, `2.50 h`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s"


def note_name(midi: float) -> str:
    """Return the name of the nearest note, `A4` for 69."""
    return f"{_NOTES[round(midi) % 12]}{round(midi) // 12 - 1}"


def midi_to_hz(midi: float) -> float:
    """Return the frequency of a MIDI note number, 440 Hz for 69."""
    return float(440 * 2 ** ((midi - 69) / 12))


def reason_in_words(reason: str) -> str:
    """Return a reason of a ledger in words: `no permission` for `no_permission`."""
    return reason.replace("_", " ")
