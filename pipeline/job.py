"""What every worker of a run is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ExtractConfig
from pipeline.shards import (
    AUDIO_SCHEMA,
    PITCH_SCHEMA,
    XVECTOR_COLUMN,
    EncoderIdentity,
    XvectorIdentity,
)
from pipeline.weights import Weights

# Called with (song_id, seconds of source audio, status) after every song.
Heartbeat = Callable[[str, float, str], None]


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
class Job:
    """What every worker of a run is told. Tasks are named by their index in the plan."""

    dataset: Path
    corpus: Path  # where the songs are; the other dataset, where one is taken over
    config: ExtractConfig
    fingerprint: str
    weights: Mapping[str, Weights]  # of what has to be loaded, by the key that names it
    gone: frozenset[str] = frozenset()  # songs of the plan that were not there when the run began
    threads: int | None = None  # of a worker; None until it is known what fits
    taken_over: TakenOver | None = None

    @property
    def makes_f0(self) -> bool:
        return self.taken_over is None or not self.taken_over.f0

    @property
    def f0_networks(self) -> tuple[str, ...]:
        return f0_networks(self.config, self.taken_over)


def f0_networks(config: ExtractConfig, taken_over: TakenOver | None) -> tuple[str, ...]:
    """The networks that find the pitch of a run; none where the pitch is taken over."""
    return () if taken_over is not None and taken_over.f0 else config.f0.networks
