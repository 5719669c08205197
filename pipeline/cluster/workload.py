"""The tasks of a run as a cluster sees them: the workers' job, operators, memory, devices.

Tested by tests/pipeline/cluster/test_ray_graph.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pipeline.storage.weight_files import WeightFile

# Memory that each checkpoint adds where networks run: its weights, at 1.1 times the file's size.
GB_PER_CHECKPOINT_GB = 1.1
# Memory of an f0 network at work whose weights come with a package. Measured: 0.3.
GB_PER_F0_NETWORK = 0.5

# Called with (song_id, seconds of it that are done, status); the status is None until its end.
Heartbeat = Callable[[str, float, str | None], None]


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Resources that a run may use of the machine or cluster. Never changes the output."""

    max_workers: int | None = None  # None: as many as the CPUs allow
    cpus_per_worker: float | None = None  # None: 1, or as many as it takes to fit into memory
    gpus_per_worker: float = 1.0  # for workers that run networks, when the cluster has GPUs
    object_store_gb: float | None = None  # None: a tenth of the memory, at most 4; local runs only
    scratch: str | None = None  # folder for decoded PCM; None: the system's temporary folder
    max_task_retries: int = 3  # deaths of a worker on one task before it is redone song by song

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < 1:
            raise ValueError(f"workers.max_workers is {self.max_workers}; it must be 1 or more")
        cpus = self.cpus_per_worker
        if (cpus is not None and cpus <= 0) or self.gpus_per_worker <= 0:
            raise ValueError("workers.cpus_per_worker and workers.gpus_per_worker must be > 0")


class HasWorkers(Protocol):
    """Settings with a section `workers`."""

    @property
    def workers(self) -> WorkersConfig: ...


C = TypeVar("C", bound=HasWorkers)


@dataclass(frozen=True)
class Job(Generic[C]):
    """Everything about a run that each of its workers gets. Tasks are indices of the plan.

    folder: the folder that the run fills; it holds the plan. corpus: the folder of the songs.
    weights: files that have to be loaded, by the key that names them.
    gone: planned songs that were missing when the run began.
    threads: threads of a worker; None until the pools are planned.
    """

    folder: Path
    corpus: Path
    config: C
    fingerprint: str
    weights: Mapping[str, WeightFile]
    gone: frozenset[str] = frozenset()
    threads: int | None = None


class Worker(Protocol):
    """An operator: one-row Arrow tables in and out, as in `pipeline.extract.task`."""

    def __call__(self, row: Any) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Needs:
    """Resources that the workers of a run need.

    base_gb: memory for libraries and the buffers of one song. gb_per_minute: memory that each
    minute of a task adds. models_gb: memory of the networks, where they run.
    devices: "auto", "cpu" or "cuda" for each network, by the key that sets it.
    remedy: advice for a task that is too large for every worker.
    """

    base_gb: float
    gb_per_minute: float
    models_gb: float
    devices: Mapping[str, str]
    remedy: str


@dataclass(frozen=True)
class Workload:
    """The tasks of a run, how to do one, and the resources that this takes.

    whole: the operator that does a whole task.
    split: a pair of operators for clusters with GPUs: the first prepares a task on a CPU, the
    second finishes it on a GPU. None: there `whole` gets a GPU.
    load: loads everything that a worker loads; None: there is nothing to load.
    probe: does one song of a task, given its index, and commits nothing.
    notice: a note to print before the run, given whether networks have a GPU.
    """

    job: Job[Any]
    needs: Needs
    whole: Callable[[Any, Heartbeat], Worker]
    split: tuple[type[Any], type[Any]] | None
    load: Callable[[Any], None] | None
    probe: Callable[[Any, int, str], None]
    notice: Callable[[bool], str | None]
