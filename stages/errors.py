"""Reasons why a song or clip is left out, as ledgers and reports name them.

A broken file raises `BadInput`, and its song is quarantined. A readable song that the settings
exclude is filtered: it has no clips, and `Dropped` says why. Any other exception of a stage is a
bug in Cantor or a fault of the storage.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """The reason why a song or a clip is not in the dataset; measures declare their own."""

    # quarantined: the input is broken
    EMPTY = "empty_file"
    MISSING = "missing"
    CHANGED = "changed_since_planned"
    NO_PERMISSION = "no_permission"
    UNREADABLE = "unreadable"
    UNSUPPORTED = "unsupported_format"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    NOT_FINITE = "not_finite"
    OUT_OF_RANGE = "out_of_range"
    TOO_MANY_CHANNELS = "too_many_channels"
    TOO_LONG = "too_long"
    NO_ROOM = "no_room"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    # filtered: the input is fine, a setting excludes it
    SILENT = "silent"
    SILENCE = "silence"
    TOO_SHORT = "too_short"


class BadInput(Exception):
    """An error of the input file; its song is quarantined with this reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)  # both arguments, so that it survives pickling
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Dropped:
    """Stretches of a readable song that did not become clips, for one reason.

    reason: a `Reason`, or that of a measure of `stages.quality`.
    """

    reason: str
    clips: int
    seconds: float
