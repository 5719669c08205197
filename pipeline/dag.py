"""The Ray Data graph: a row is a task, one actor-pool operator, two where the cluster has GPUs.

Ray schedules, retries and restarts; what is written once is decided by the plan and the commit.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import ExtractConfig
from pipeline.errors import SongBug, UserError
from pipeline.job import Job, TakenOver, f0_networks
from pipeline.plan import Task
from pipeline.progress import Board
from pipeline.shards import storage_fault
from pipeline.weights import Weights, size_and_mtime
from pipeline.workers import (
    ExtractTask,
    FinishTask,
    PrepareTask,
    TaskResult,
    load_models,
    probe_song,
    read_result,
    task_row,
)

# A worker's memory: libraries and one song's buffers, then what each minute of its task adds
# (FLAC clips, f0, units in float32 while packed). Generous: one-minute tasks peak at 0.7 GB,
# three hours of singing in one task below 2 GB.
_WORKER_BASE_GB = 0.8
_WORKER_GB_PER_MINUTE = 0.02

# What each checkpoint adds where units are made: its weights, and what a batch of clips fills.
_GB_PER_CHECKPOINT_GB = 1.1
_BATCH_GB = 1.0
_BUNDLED_GB = 0.5  # a network of f0 whose weights come with a package, at work; measured: 0.3


@dataclass(frozen=True)
class Pools:
    """How many workers of each kind a run uses. gpu = 0: one operator does it all.

    cpus: of each worker. memory, gpu_memory: bytes asked of Ray for each.
    """

    cpu: int
    gpu: int
    cpus: float
    memory: int
    gpu_memory: int

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def worker_memory_gb(tasks: Mapping[int, Task]) -> float:
    """What a worker may hold at its longest task."""
    longest = max(map(_believable_minutes, tasks.values()))
    return _WORKER_BASE_GB + _WORKER_GB_PER_MINUTE * longest


def _believable_minutes(task: Task) -> float:
    """Of audio. A header may lie; no file of music holds more than a second in a kilobyte."""
    return sum(min(song.duration_s, 60.0 + song.size / 1000) for song in task.songs) / 60


def models_gb(weights: Mapping[str, Weights], bundled: int = 0) -> float:
    """What the models add to a worker that makes pitch, units and x-vectors.

    bundled: how many networks of f0 there are whose weights come with packages.
    """
    sizes = [weights[key].size for key in weights if key.endswith(".checkpoint")]
    models = sum(_GB_PER_CHECKPOINT_GB * size / 2**30 + _BATCH_GB for size in sizes)
    return models + bundled * _BUNDLED_GB


def plan_pools(
    nodes: list[dict[str, float]],
    tasks: Mapping[int, Task],
    config: ExtractConfig,
    weights: Mapping[str, Weights] | None = None,
    threads: int | None = None,
    taken_over: TakenOver | None = None,
) -> Pools:
    """Pool sizes for the resources of the living nodes ({"CPU", "GPU", "memory" in bytes}).

    threads: that the shards so far were made with; kept where the settings leave them open, so
    that the rest has the same bits, unless no such worker fits. taken_over: columns that nobody
    has to compute.
    Raises: UserError with the numbers when not even one worker fits.
    """
    workers = config.workers
    memory = math.ceil(worker_memory_gb(tasks) * 2**30)
    bundled = len(set(f0_networks(config, taken_over)) - {"rmvpe"})
    models_size = models_gb(weights or {}, bundled)
    units_memory = memory + math.ceil(models_size * 2**30)
    most = min(len(tasks), workers.max_workers or len(tasks))
    gpus_wanted = _wants_gpus(config, nodes, taken_over)
    if gpus_wanted:
        cpus = workers.cpus_per_worker or 1.0
        cpu, gpu = _share_gpus(nodes, cpus, workers.gpus_per_worker, memory, units_memory, most)
        if cpu and gpu:
            return Pools(min(most, cpu), gpu, cpus, memory, units_memory)
    else:
        cpus = workers.cpus_per_worker or _cpus_that_fit(nodes, units_memory, threads)
        slots = _slots(nodes, cpus, units_memory)
        if slots:
            return Pools(min(most, slots), 0, cpus, units_memory, 0)
    longest = max(tasks.values(), key=_believable_minutes)
    have = "; ".join(
        f"{node.get('CPU', 0):g} CPUs and {node.get('memory', 0) / 2**30:.1f} GB" for node in nodes
    )
    with_gpus = f" (and {workers.gpus_per_worker:g} GPUs)" if gpus_wanted else ""
    models = f", its models take {models_size:.1f} GB" if models_size else ""
    raise UserError(
        f"no worker fits: each needs {cpus:g} CPUs{with_gpus} and {units_memory / 2**30:.1f} GB "
        f"(task {longest.index} holds {_believable_minutes(longest):.0f} minutes of audio{models})"
        f", and the nodes offer {have or 'nothing'}; lower plan.task_minutes "
        "(new dataset) or workers.cpus_per_worker, or use a larger machine"
    )


def _wants_gpus(
    config: ExtractConfig, nodes: list[dict[str, float]], taken_over: TakenOver | None
) -> bool:
    """The cluster has GPUs, and a model may use them.

    Raises: UserError when it has none and one must.
    """
    taken = {identity.name for identity in taken_over.units} if taken_over else set()
    devices = {
        f"{section}.device": encoder.device
        for section, encoder in config.all_encoders.items()
        if encoder.name not in taken
    }
    if config.xvector.checkpoint is not None and not (taken_over and taken_over.xvector):
        devices["xvector.device"] = config.xvector.device
    if f0_networks(config, taken_over):
        devices["f0.device"] = config.f0.device
    per_worker = config.workers.gpus_per_worker
    if any(node.get("GPU", 0) >= per_worker for node in nodes):
        return any(device != "cpu" for device in devices.values())
    for key, device in devices.items():
        if device == "cuda":
            raise UserError(
                f"{key} is cuda, and no node of the cluster offers a GPU; set {key} to auto or cpu"
            )
    return False


def _slots(nodes: list[dict[str, float]], cpus: float, memory: int) -> int:
    """Workers of `cpus` CPUs and `memory` bytes that the nodes hold."""
    return sum(
        int(min(node.get("CPU", 0) // cpus, node.get("memory", 0) // memory)) for node in nodes
    )


def _cpus_that_fit(nodes: list[dict[str, float]], memory: int, threads: int | None) -> float:
    """CPUs of a worker: 1, 2, 4, ..., the fewest of those that leave no more of them idle.

    Where every CPU's own worker fits into memory this is 1. It does not depend on how much is left
    to do, so that a resumed run has the same threads.
    """
    if threads is not None and _slots(nodes, threads, memory):
        return float(threads)
    largest = max((node.get("CPU", 0) for node in nodes), default=0)
    choices = [2.0**power for power in range(int(math.log2(max(1.0, largest))) + 1)]
    return max(choices, key=lambda cpus: (cpus * _slots(nodes, cpus, memory), -cpus))


def _share_gpus(
    nodes: list[dict[str, float]],
    cpus: float,
    gpus: float,
    memory: int,
    gpu_memory: int,
    most: int,
) -> tuple[int, int]:
    """Workers on CPUs and workers on GPUs; each of the latter takes `cpus` CPUs as well."""
    placed = [
        int(
            min(
                node.get("GPU", 0) // gpus,
                node.get("CPU", 0) // cpus,
                node.get("memory", 0) // gpu_memory,
            )
        )
        for node in nodes
    ]
    while True:
        rest = [
            {
                "CPU": node.get("CPU", 0) - count * cpus,
                "memory": node.get("memory", 0) - count * gpu_memory,
            }
            for node, count in zip(nodes, placed, strict=True)
        ]
        room = _slots(rest, cpus, memory)
        if not any(placed) or (room and sum(placed) <= most):
            return room, sum(placed)
        placed[placed.index(max(placed))] -= 1


def living_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(dataset: Path, corpus: Path, weights: Collection[Weights] = ()) -> None:
    """Every node reads a token from DATASET, opens CORPUS and finds the same files of weights.

    Raises: UserError naming the node that cannot.
    """
    token = secrets.token_hex(8)
    path = dataset / ".tmp" / f"token-{token}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(token)

    def look() -> str:
        try:
            if path.read_text() != token:
                return f"it finds another file at {path}"
            with os.scandir(corpus):
                pass
            for file in weights:
                size, _ = size_and_mtime(file.path)
                if size != file.size:
                    return f"{file.path} has {size} bytes there and {file.size} here"
            return ""
        except OSError as error:
            return f"{error.filename}: {error.strerror}"

    try:
        answers = {
            node["NodeManagerHostname"] + " " + node["NodeManagerAddress"]: ray.remote(num_cpus=0)(
                look
            )
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote()
            for node in living_nodes()
        }
        for name, answer in answers.items():
            trouble = ray.get(answer)
            if trouble:
                raise UserError(
                    f"node {name} does not share the storage: {trouble}; DATASET, CORPUS and "
                    "checkpoints must be on a file system that every node mounts at the same path"
                )
    finally:
        path.unlink(missing_ok=True)


def run_graph(
    job: Job,
    tasks: Mapping[int, Task],
    crashed: Mapping[int, Collection[str]],
    pools: Pools,
    board: Any,
) -> Iterator[TaskResult]:
    """Results of the tasks as they end. A task whose worker died too often gives none."""
    workers, cpus = job.config.workers, pools.cpus
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.max_errored_blocks = -1  # a task whose worker keeps dying is dropped, and we notice
    context.max_consecutive_actor_init_deaths = 16
    context.execution_no_progress_timeout_s = -1  # it sees only whole tasks; long ones are well
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # max_task_retries has no named parameter yet; without it a poisonous task is retried for ever.
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data")
    options = {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "max_task_retries": workers.max_task_retries,
    }
    rows = [task_row(index, crashed.get(index, ())) for index in tasks]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    cpu_pool = ray.data.ActorPoolStrategy(min_size=1, max_size=pools.cpu, initial_size=pools.cpu)
    if pools.gpu == 0:
        data = data.map_batches(
            ExtractTask,
            fn_constructor_args=(job, _Remote(board)),
            compute=cpu_pool,
            num_cpus=cpus,
            memory=pools.memory,
            **options,
        )
    else:
        data = data.map_batches(
            PrepareTask,
            fn_constructor_args=(job, _Remote(board)),
            compute=cpu_pool,
            num_cpus=cpus,
            memory=pools.memory,
            **options,
        ).map_batches(
            FinishTask,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=pools.gpu, initial_size=pools.gpu
            ),
            num_cpus=cpus,
            num_gpus=workers.gpus_per_worker,
            memory=pools.gpu_memory,
            **options,
        )
    for batch in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield read_result(batch)


class _Remote:
    """A heartbeat that a worker sends to the driver's board and does not wait for."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def __call__(self, song_id: str, seconds: float, status: str) -> None:
        self.board.song_done.remote(song_id, seconds, status)


def start_board() -> Any:
    """The actor that counts finished songs, beside the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.options(scheduling_strategy=here).remote()


def require_loadable(job: Job, pools: Pools) -> None:
    """Load the models once in a worker of their own, before songs are blamed for its death.

    Raises: UserError when the worker dies of it, or cannot load them.
    """
    if not job.weights and not job.f0_networks:
        return
    gpus = job.config.workers.gpus_per_worker if pools.gpu else 0
    memory = pools.gpu_memory or pools.memory
    load = ray.remote(
        num_cpus=pools.cpus, num_gpus=gpus, memory=memory, max_retries=0, max_calls=1
    )(load_models)
    if _dies(load, job):
        files = ", ".join(sorted({file.path for file in job.weights.values()}))
        files = files or "the networks of f0"
        raise UserError(
            f"a worker process dies while it loads {files}; is there enough memory? "
            f"{memory / 2**30:.1f} GB were set aside for it"
        )


def find_killers(job: Job, task: Task, pools: Pools) -> set[str]:
    """The songs of a task on which a fresh process dies twice, found one by one.

    Raises: UserError when it dies without any song.
    """
    require_loadable(job, pools)
    probe = ray.remote(
        num_cpus=pools.cpus,
        memory=pools.gpu_memory or pools.memory,
        max_retries=0,
        max_calls=1,
    )(probe_song)

    def dies(song_id: str) -> bool:
        return _dies(probe, job, task.index, song_id)

    return {s.song_id for s in task.songs if dies(s.song_id) and dies(s.song_id)}


def _dies(remote: Any, job: Job, *words: Any) -> bool:
    """Whether a process dies of this. Its other faults are raised as what they are."""
    try:
        ray.get(remote.remote(job, *words))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return True
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        if isinstance(error.cause, OSError):
            raise storage_fault(error.cause) from error
        raise SongBug(": ".join([*map(str, words[1:]), str(error)])) from error
    return False
