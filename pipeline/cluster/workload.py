"""What every worker of a run is told, and how the tasks of a run are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pipeline.dataset.shards import (
    AUDIO_SCHEMA,
    PITCH_SCHEMA,
    XVECTOR_COLUMN,
    EncoderIdentity,
    XvectorIdentity,
)
from pipeline.extract.config import ExtractConfig, WorkersConfig
from pipeline.storage.weight_files import Weights

# Called with (song_id, seconds of it that are done, status); the status is None until its end.
Heartbeat = Callable[[str, float, str | None], None]


class RunConfig(Protocol):
    """Settings of a run on many workers."""

    @property
    def workers(self) -> WorkersConfig: ...


C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Job(Generic[C]):
    """What every worker of a run is told. Tasks are named by their index in the plan.

    threads: of a worker; None until it is known what fits.
    """

    folder: Path  # that is filled; it holds the plan
    corpus: Path  # where the songs are
    config: C
    fingerprint: str
    weights: Mapping[str, Weights]  # of what has to be loaded, by the key that names it
    gone: frozenset[str] = frozenset()  # songs of the plan that were not there when the run began
    threads: int | None = None


class Worker(Protocol):
    """An operator's code: one-row Arrow tables in and out, see `pipeline.extract.operators`."""

    def __call__(self, row: Any) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Needs:
    """What workers take of a cluster.

    base_gb: memory for libraries and the buffers of one song. gb_per_minute: what each minute of
    a task adds. models_gb: of networks at work, where they run.
    devices: "auto", "cpu" or "cuda" of each network, by the key that sets it.
    remedy: what to do about a task that is too large for every worker.
    """

    base_gb: float
    gb_per_minute: float
    models_gb: float
    devices: Mapping[str, str]
    remedy: str


@dataclass(frozen=True)
class Workload:
    """The tasks of a run: what they are, who does one, and what that takes.

    whole: the operator of a whole task. halves: where there are GPUs, the operator on CPUs, and
    that on GPUs for what the first one leaves to it; None: there `whole` has a GPU.
    load: loads everything that a worker loads; None: there is nothing to load.
    probe: does one song of a task, given its index, and commits nothing.
    notice: words before the run begins, told whether networks have a GPU.
    """

    job: Job[Any]
    needs: Needs
    whole: Callable[[Any, Heartbeat], Worker]
    halves: tuple[type[Any], type[Any]] | None
    load: Callable[[Any], None] | None
    probe: Callable[[Any, int, str], None]
    notice: Callable[[bool], str | None]


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
