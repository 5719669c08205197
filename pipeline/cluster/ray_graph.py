"""The Ray Data graph: a row is a task; one operator with a pool of actors, or two with GPUs.

Ray schedules, retries and restarts. The plan and the commit decide what is written once.
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

from pipeline.cluster.progress import Board
from pipeline.cluster.task_rows import TaskResult, read_result, task_row
from pipeline.cluster.workload import Job, Needs, WorkersConfig, Workload
from pipeline.errors import SongBug, UserError
from pipeline.songs.plan import Task
from pipeline.storage.atomic import storage_fault, temporary_folder
from pipeline.storage.weight_files import WeightFile, size_and_mtime


@dataclass(frozen=True)
class Pools:
    """Number and size of the workers of a run. Where `cpu` or `gpu` is 0, there is one operator.

    cpus: CPUs of each worker. memory: bytes of a worker on CPUs. gpu_memory: bytes of one on GPUs.
    """

    cpu: int
    gpu: int
    cpus: float
    memory: int
    gpu_memory: int

    @property
    def memory_of_networks(self) -> int:
        """Bytes of a worker that runs networks."""
        return self.gpu_memory or self.memory

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def _believable_minutes(task: Task) -> float:
    """Return the minutes of audio in a task, at most what its files can hold.

    A header may lie; no music file holds more than a second in a kilobyte.
    """
    return sum(min(song.duration_s, 60.0 + song.size / 1000) for song in task.songs) / 60


def plan_pools(
    nodes: list[dict[str, float]], tasks: Mapping[int, Task], workload: Workload
) -> Pools:
    """Return pool sizes for the resources of the living nodes ({"CPU", "GPU", "memory" in bytes}).

    A resumed run keeps the threads of its first part where the settings leave them open, so that
    the rest has the same bits, unless no such worker fits.

    Raises: UserError: when not even one worker fits.
    """
    needs, workers = workload.needs, workload.job.config.workers
    longest = max(tasks.values(), key=_believable_minutes)
    minutes = _believable_minutes(longest)
    memory = math.ceil((needs.base_gb + needs.gb_per_minute * minutes) * 2**30)
    whole_memory = memory + math.ceil(needs.models_gb * 2**30)
    most = min(len(tasks), workers.max_workers or len(tasks))
    gpus_wanted = _wants_gpus(needs, workers, nodes)
    cpus = workers.cpus_per_worker or 1.0
    if gpus_wanted and workload.split:
        cpu, gpu = _share_gpus(nodes, cpus, workers.gpus_per_worker, memory, whole_memory, most)
        if cpu and gpu:
            return Pools(min(most, cpu), gpu, cpus, memory, whole_memory)
    elif gpus_wanted:
        gpu = sum(_placed_on_gpus(nodes, cpus, workers.gpus_per_worker, whole_memory))
        if gpu:
            return Pools(0, min(most, gpu), cpus, 0, whole_memory)
    else:
        cpus = workers.cpus_per_worker or _cpus_that_fit(nodes, whole_memory, workload.job.threads)
        slots = _slots(nodes, cpus, whole_memory)
        if slots:
            return Pools(min(most, slots), 0, cpus, whole_memory, 0)
    have = "; ".join(
        f"{node.get('CPU', 0):g} CPUs and {node.get('memory', 0) / 2**30:.1f} GB" for node in nodes
    )
    with_gpus = f" (and {workers.gpus_per_worker:g} GPUs)" if gpus_wanted else ""
    models = f", its models take {needs.models_gb:.1f} GB" if needs.models_gb else ""
    raise UserError(
        f"no worker fits: each needs {cpus:g} CPUs{with_gpus} and {whole_memory / 2**30:.1f} GB "
        f"(task {longest.index} holds {minutes:.0f} minutes of audio{models}), but the nodes "
        f"offer {have or 'nothing'}; {needs.remedy}, or use a larger machine"
    )


def _wants_gpus(needs: Needs, workers: WorkersConfig, nodes: list[dict[str, float]]) -> bool:
    """Return True when the cluster has GPUs and some network may use one.

    Raises: UserError: when a network must have a GPU and the cluster has none.
    """
    if any(node.get("GPU", 0) >= workers.gpus_per_worker for node in nodes):
        return any(device != "cpu" for device in needs.devices.values())
    for key, device in needs.devices.items():
        if device == "cuda":
            raise UserError(
                f"{key} is cuda, but no node of the cluster has a GPU; set {key} to auto or cpu"
            )
    return False


def _slots(nodes: list[dict[str, float]], cpus: float, memory: int) -> int:
    """Return how many workers of `cpus` CPUs and `memory` bytes fit on the nodes."""
    return sum(
        int(min(node.get("CPU", 0) // cpus, node.get("memory", 0) // memory)) for node in nodes
    )


def _cpus_that_fit(nodes: list[dict[str, float]], memory: int, threads: int | None) -> float:
    """Return the CPUs of a worker: of 1, 2, 4, ... the fewest that keep the most CPUs busy.

    This is 1 where memory has room for a worker on every CPU. It does not depend on how much is
    left to do, so that a resumed run has the same threads.
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
    """Return the workers on CPUs and on GPUs; each of the latter takes `cpus` CPUs as well."""
    placed = _placed_on_gpus(nodes, cpus, gpus, gpu_memory)
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


def _placed_on_gpus(
    nodes: list[dict[str, float]], cpus: float, gpus: float, memory: int
) -> list[int]:
    """Return how many workers of so many CPUs, GPUs and bytes fit on each node."""
    return [
        int(
            min(
                node.get("GPU", 0) // gpus,
                node.get("CPU", 0) // cpus,
                node.get("memory", 0) // memory,
            )
        )
        for node in nodes
    ]


def living_nodes() -> list[dict[str, Any]]:
    """Return the nodes of the cluster that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(dataset: Path, corpus: Path, weights: Collection[WeightFile] = ()) -> None:
    """Have every node read a token from DATASET, open CORPUS and compare the files of weights.

    Raises: UserError: when a node cannot (the message names it).
    """
    token = secrets.token_hex(8)
    path = temporary_folder(dataset) / f"token-{token}"
    path.write_text(token)

    def inspect() -> str:
        try:
            if path.read_text() != token:
                return f"it has another file at {path}"
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
                inspect
            )
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote()
            for node in living_nodes()
        }
        for name, answer in answers.items():
            problem = ray.get(answer)
            if problem:
                raise UserError(
                    f"node {name} does not share the storage: {problem}; put DATASET, CORPUS and "
                    "checkpoints on a file system that every node mounts at the same path"
                )
    finally:
        path.unlink(missing_ok=True)


def run_graph(
    workload: Workload,
    tasks: Mapping[int, Task],
    crashed: Mapping[int, Collection[str]],
    pools: Pools,
    board: Any,
) -> Iterator[TaskResult]:
    """Yield the results of tasks as they end. A task whose worker died too often gives none."""
    job = workload.job
    workers = job.config.workers
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.max_errored_blocks = -1  # drop a task whose worker keeps dying; run_rounds notices
    context.max_consecutive_actor_init_deaths = 16
    context.execution_no_progress_timeout_s = -1  # it sees whole tasks only, which may be long
    context.print_on_execution_start = False
    # It prints the traceback of each task that is dropped, though run_rounds looks after those.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # max_task_retries has no named parameter yet; without it Ray retries such a task for ever.
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
    on_cpu = {"num_cpus": pools.cpus, "memory": pools.memory, **options}
    on_gpu = {
        "num_cpus": pools.cpus,
        "num_gpus": workers.gpus_per_worker,
        "memory": pools.gpu_memory,
        **options,
    }
    heartbeat = _RemoteHeartbeat(board)
    if pools.cpu and pools.gpu and workload.split:
        prepare, finish = workload.split
        data = _through_pool(data, prepare, (job, heartbeat), pools.cpu, on_cpu)
        data = _through_pool(data, finish, (job,), pools.gpu, on_gpu)
    elif pools.gpu:
        data = _through_pool(data, workload.whole, (job, heartbeat), pools.gpu, on_gpu)
    else:
        data = _through_pool(data, workload.whole, (job, heartbeat), pools.cpu, on_cpu)
    for batch in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield read_result(batch)


def _through_pool(
    data: ray.data.Dataset,
    operator: Any,
    arguments: tuple[Any, ...],
    size: int,
    options: dict[str, Any],
) -> ray.data.Dataset:
    """Return `data` mapped by a pool of `size` actors. arguments: of the operator's constructor."""
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size)
    return data.map_batches(operator, fn_constructor_args=arguments, compute=pool, **options)


class _RemoteHeartbeat:
    """A heartbeat that a worker sends to the driver's board without waiting for an answer."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def __call__(self, song_id: str, seconds: float, status: str | None) -> None:
        self.board.record.remote(song_id, seconds, status)


def start_board() -> Any:
    """Start the actor that counts finished songs, on the driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.options(scheduling_strategy=here).remote()


def require_loadable(workload: Workload, pools: Pools) -> None:
    """Load the models once in a worker of their own, before any song is blamed for its death.

    Raises: UserError: when the worker dies while loading, or cannot load them.
    """
    if workload.load is None:
        return
    job = workload.job
    load = _in_a_worker_of_its_own(workload.load, job, pools)
    if _dies(load, job):
        files = ", ".join(sorted({file.path for file in job.weights.values()}))
        files = files or "the networks of f0"
        raise UserError(
            f"a worker process dies while it loads {files}. It has "
            f"{pools.memory_of_networks / 2**30:.1f} GB; if that is too little, lower "
            "workers.max_workers"
        )


def find_killers(workload: Workload, task: Task, pools: Pools) -> set[str]:
    """Return the songs of a task on which a fresh process dies twice, each tried alone.

    Raises: UserError: when a process dies before it reads a song.
    """
    require_loadable(workload, pools)
    probe = _in_a_worker_of_its_own(workload.probe, workload.job, pools)

    def dies(song_id: str) -> bool:
        return _dies(probe, workload.job, task.index, song_id)

    return {s.song_id for s in task.songs if dies(s.song_id) and dies(s.song_id)}


def _in_a_worker_of_its_own(function: Any, job: Job[Any], pools: Pools) -> Any:
    """Return `function` as a remote in a fresh process, with a network worker's resources."""
    gpus = job.config.workers.gpus_per_worker if pools.gpu else 0
    options = {"num_cpus": pools.cpus, "num_gpus": gpus, "memory": pools.memory_of_networks}
    return ray.remote(max_retries=0, max_calls=1, **options)(function)


def _dies(remote: Any, job: Job[Any], *arguments: Any) -> bool:
    """Return True when the process dies of this call. Other errors are raised as they are."""
    try:
        ray.get(remote.remote(job, *arguments))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return True
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        if isinstance(error.cause, OSError):
            raise storage_fault(error.cause) from error
        raise SongBug(": ".join([*map(str, arguments[1:]), str(error)])) from error
    return False
