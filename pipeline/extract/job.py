"""The job of an extraction: everything that its workers get.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.workload import Job
from pipeline.dataset.schema import (
    AUDIO_COLUMNS,
    AUDIO_SCHEMA,
    PITCH_SCHEMA,
    SCHEMA_VERSION,
    XVECTOR_COLUMN,
    EncoderIdentity,
    XvectorIdentity,
    audio_columns,
)
from pipeline.extract.config import ExtractConfig


@dataclass(frozen=True)
class TakenOver:
    """Columns taken over from the shards of another dataset: the audio, and these.

    f0: with the measures of pitch. units: a pair of columns for each encoder.
    """

    dataset: Path
    fingerprint: str
    schema_version: int
    f0: bool
    units: tuple[EncoderIdentity, ...]
    xvector: XvectorIdentity | None

    @property
    def columns(self) -> list[str]:
        pitch = PITCH_SCHEMA.names if self.f0 else []
        units = [name for each in self.units for name in (each.column, each.frames_column)]
        xvector = [XVECTOR_COLUMN] if self.xvector else []
        audio = [name for name in AUDIO_SCHEMA.names if name not in self.missing_measures]
        return [*audio, *pitch, *units, *xvector]

    @property
    def missing_measures(self) -> tuple[str, ...]:
        """Measures of audio that shards of this schema version do not have."""
        present = audio_columns(self.schema_version)
        return tuple(name for name in AUDIO_COLUMNS if name not in present)


@dataclass(frozen=True)
class ExtractJob(Job[ExtractConfig]):
    """The job of an extraction. corpus: the other dataset, where `taken_over` is set."""

    taken_over: TakenOver | None = None
    schema_version: int = SCHEMA_VERSION  # of its shards

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
