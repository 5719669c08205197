"""What may be done to a contour after it is estimated; each step is off unless it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stages.types import Array


@dataclass(frozen=True, kw_only=True)
class PostConfig:
    """Steps in the order in which they are taken.

    gate, gate_db: frames whose level lies below gate_db (dBFS) become unvoiced. "rms" is the level
      as it is, "a-weighted" as the ear weighs it (IEC 61672).
    repair_octaves: short stretches that lie an octave from both neighbours move back.
    median_ms: a median over as much of each voiced run.
    min_voiced_ms: shorter voiced runs become unvoiced.
    interpolate: unvoiced frames get the straight line in log f0 between their voiced neighbours,
      the ends are held; then no 0 is left to tell voiced from unvoiced.
    """

    gate: Literal["none", "rms", "a-weighted"] = "none"
    gate_db: float = -60.0
    repair_octaves: bool = False
    median_ms: float | None = None
    min_voiced_ms: float | None = None
    interpolate: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the key that is out of range."""


def refine(f0: Array, wav: Array, sample_rate: int, hop_length: int, cfg: PostConfig) -> Array:
    """The contour (F,) of a clip (T,) after the steps of `cfg`; float32 (F,)."""
    return f0
