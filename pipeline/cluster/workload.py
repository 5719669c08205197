"""What every worker of a run is told, and how the tasks of a run are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pipeline.storage.weight_files import WeightFile

# Called with (song_id, seconds of it that are done, status); the status is None until its end.
Heartbeat = Callable[[str, float, str | None], None]


class HasWorkers(Protocol):
    """Settings of a run on many workers."""

    @property
    def workers(self) -> WorkersConfig: ...


C = TypeVar("C", bound=HasWorkers)


@dataclass(frozen=True)
class Job(Generic[C]):
    """What every worker of a run is told. Tasks are named by their index in the plan.

    threads: of a worker; None until it is known what fits.
    """

    folder: Path  # that is filled; it holds the plan
    corpus: Path  # where the songs are
    config: C
    fingerprint: str
    weights: Mapping[str, WeightFile]  # of what has to be loaded, by the key that names it
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


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """What a run may use of the machine or cluster. Never changes the output."""

    max_workers: int | None = None  # None: as many as the CPUs allow
    cpus_per_worker: float | None = None  # None: 1, or as many as it takes to fit into memory
    gpus_per_worker: float = 1.0  # for the units operator, when the cluster has GPUs
    object_store_gb: float | None = None  # None: a tenth of the memory, at most 4; local runs only
    scratch: str | None = None  # folder for decoded PCM; None: the system's temporary folder
    max_task_retries: int = 3  # deaths of a worker on one task before it is redone song by song

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < 1:
            raise ValueError(f"workers.max_workers is {self.max_workers}; it must be 1 or more")
        cpus = self.cpus_per_worker
        if (cpus is not None and cpus <= 0) or self.gpus_per_worker <= 0:
            raise ValueError("workers.cpus_per_worker and workers.gpus_per_worker must be > 0")


# What each checkpoint adds where units are made: its weights, and what a batch of clips fills.
GB_PER_CHECKPOINT_GB = 1.1


BUNDLED_GB = 0.5  # a network of f0 whose weights come with a package, at work; measured: 0.3
