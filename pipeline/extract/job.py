"""The job of an extraction, as every worker gets it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.workload import Job
from pipeline.dataset.schema import (
    AUDIO_SCHEMA,
    PITCH_SCHEMA,
    XVECTOR_COLUMN,
    EncoderIdentity,
    XvectorIdentity,
)
from pipeline.extract.config import ExtractConfig


@dataclass(frozen=True)
class TakenOver:
    """What comes from the shards of another dataset instead of being made: the audio, and these."""

    dataset: Path
    fingerprint: str
    f0: bool  # with what is measured on it
    units: tuple[EncoderIdentity, ...]
    xvector: XvectorIdentity | None

    @property
    def columns(self) -> list[str]:
        pitch = PITCH_SCHEMA.names if self.f0 else []
        units = [name for each in self.units for name in (each.column, each.frames_column)]
        xvector = [XVECTOR_COLUMN] if self.xvector else []
        return [*AUDIO_SCHEMA.names, *pitch, *units, *xvector]


@dataclass(frozen=True)
class ExtractJob(Job[ExtractConfig]):
    """corpus: the other dataset, where one is taken over."""

    taken_over: TakenOver | None = None

    @property
    def makes_f0(self) -> bool:
        return self.taken_over is None or not self.taken_over.f0

    @property
    def f0_networks(self) -> tuple[str, ...]:
        """The networks that find the pitch; none where the pitch is taken over."""
        return self.config.f0.networks if self.makes_f0 else ()
