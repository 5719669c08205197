"""Every measure of clips, and the section `quality` of the settings, which follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from stages.quality.audio import AUDIO_MEASURES
from stages.quality.measure import Measure, first_beyond
from stages.quality.pitch import PITCH_MEASURES

MEASURES: tuple[Measure[Any], ...] = (*AUDIO_MEASURES, *PITCH_MEASURES)

_LIMITS = {limit.key: limit for measure in MEASURES for limit in measure.limits}

_Fields: Any = make_dataclass(
    "_Fields",
    [(key, float | None, field(default=None)) for key in _LIMITS],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class QualityConfig(_Fields):  # type: ignore[misc]  # its fields are the limits of MEASURES
    """Limits beyond which a clip is left out, `float | None` each; None keeps all."""

    def __post_init__(self) -> None:
        """Raises: ValueError: when a limit is out of range, or two of them leave no value."""
        for key, limit in _LIMITS.items():
            value = getattr(self, key)
            if value is None:
                continue
            limit.check(value)
            other = limit.below and getattr(self, limit.below)
            if other is not None and not value < other:
                raise ValueError(
                    f"quality.{key} ({value}) must lie below quality.{limit.below} ({other})"
                )


def unwanted(values: Mapping[str, float], config: QualityConfig) -> str | None:
    """Return why a clip whose audio has these values is left out; None where it is kept."""
    return first_beyond(AUDIO_MEASURES, values, config)


def unwanted_pitch(values: Mapping[str, float], config: QualityConfig) -> str | None:
    """Return why a clip whose pitch has these values is left out; None where it is kept.

    A clip without a voiced frame has no pitch: only its `voiced_ratio` counts.
    """
    measures = PITCH_MEASURES if values["voiced_ratio"] else PITCH_MEASURES[:1]
    return first_beyond(measures, values, config)
