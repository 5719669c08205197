"""The job of an extraction: everything that its workers get."""

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
    """Columns taken over from the shards of another dataset: the audio, and these.

    f0: with the measures of pitch. units: a pair of columns for each encoder.
    """

    dataset: Path
    fingerprint: str
    f0: bool
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
    """The job of an extraction. corpus: the other dataset, where `taken_over` is set."""

    taken_over: TakenOver | None = None

    @property
    def makes_f0(self) -> bool:
        return self.taken_over is None or not self.taken_over.f0

    @property
    def f0_networks(self) -> tuple[str, ...]:
        """Networks that estimate f0; none where f0 is taken over."""
        return self.config.f0.networks if self.makes_f0 else ()

    @property
    def units_taken_over(self) -> dict[str, EncoderIdentity]:
        """Encoders whose units are taken over, by name."""
        units = self.taken_over.units if self.taken_over else ()
        return {identity.name: identity for identity in units}

    @property
    def makes_xvector(self) -> bool:
        if self.config.xvector.checkpoint is None:
            return False
        return self.taken_over is None or self.taken_over.xvector is None
