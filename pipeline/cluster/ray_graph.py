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

from pipeline.cluster.progress import Board
from pipeline.cluster.task_rows import TaskResult, read_result, task_row
from pipeline.cluster.workload import Job, Needs, WorkersConfig, Workload
from pipeline.errors import SongBug, UserError
from pipeline.songs.plan import Task
from pipeline.storage.atomic import storage_fault
from pipeline.storage.weight_files import WeightFile, size_and_mtime


@dataclass(frozen=True)
class Pools:
    """How many workers of each kind a run uses. Where either is 0, one operator does it all.

    cpus: of each worker. memory, gpu_memory: bytes asked of Ray for each.
    """

    cpu: int
    gpu: int
    cpus: float
    memory: int
    gpu_memory: int

    @property
    def most_memory(self) -> int:
        """Of a worker that runs networks."""
        return self.gpu_memory or self.memory

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def _believable_minutes(task: Task) -> float:
    """Of audio. A header may lie; no file of music holds more than a second in a kilobyte."""
    return sum(min(song.duration_s, 60.0 + song.size / 1000) for song in task.songs) / 60


def plan_pools(
    nodes: list[dict[str, float]], tasks: Mapping[int, Task], workload: Workload
) -> Pools:
    """Pool sizes for the resources of the living nodes ({"CPU", "GPU", "memory" in bytes}).

    The job's threads, that what is there was made with, are kept where the settings leave them
    open, so that the rest has the same bits, unless no such worker fits.
    Raises: UserError with the numbers when not even one worker fits.
    """
    needs, workers = workload.needs, workload.job.config.workers
    longest = max(tasks.values(), key=_believable_minutes)
    minutes = _believable_minutes(longest)
    memory = math.ceil((needs.base_gb + needs.gb_per_minute * minutes) * 2**30)
    whole_memory = memory + math.ceil(needs.models_gb * 2**30)
    most = min(len(tasks), workers.max_workers or len(tasks))
    gpus_wanted = _wants_gpus(needs, workers, nodes)
    cpus = workers.cpus_per_worker or 1.0
    if gpus_wanted and workload.halves:
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
        f"(task {longest.index} holds {minutes:.0f} minutes of audio{models})"
        f", and the nodes offer {have or 'nothing'}; {needs.remedy}, or use a larger machine"
    )


def _wants_gpus(needs: Needs, workers: WorkersConfig, nodes: list[dict[str, float]]) -> bool:
    """The cluster has GPUs, and a model may use them.

    Raises: UserError when it has none and one must.
    """
    if any(node.get("GPU", 0) >= workers.gpus_per_worker for node in nodes):
        return any(device != "cpu" for device in needs.devices.values())
    for key, device in needs.devices.items():
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
    """Workers of so many CPUs, GPUs and bytes that each node holds."""
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
    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(dataset: Path, corpus: Path, weights: Collection[WeightFile] = ()) -> None:
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
    workload: Workload,
    tasks: Mapping[int, Task],
    crashed: Mapping[int, Collection[str]],
    pools: Pools,
    board: Any,
) -> Iterator[TaskResult]:
    """Results of the tasks as they end. A task whose worker died too often gives none."""
    job = workload.job
    workers = job.config.workers
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
    of_cpu = {"num_cpus": pools.cpus, "memory": pools.memory, **options}
    of_gpu = {
        "num_cpus": pools.cpus,
        "num_gpus": workers.gpus_per_worker,
        "memory": pools.gpu_memory,
        **options,
    }
    told = (job, _Remote(board))
    if pools.cpu and pools.gpu and workload.halves:
        first, second = workload.halves
        data = _mapped(data, first, told, pools.cpu, of_cpu)
        data = _mapped(data, second, (job,), pools.gpu, of_gpu)
    elif pools.gpu:
        data = _mapped(data, workload.whole, told, pools.gpu, of_gpu)
    else:
        data = _mapped(data, workload.whole, told, pools.cpu, of_cpu)
    for batch in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield read_result(batch)


def _mapped(
    data: ray.data.Dataset, operator: Any, told: tuple[Any, ...], size: int, options: dict[str, Any]
) -> ray.data.Dataset:
    """`data` through a pool of `size` actors."""
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size)
    return data.map_batches(operator, fn_constructor_args=told, compute=pool, **options)


class _Remote:
    """A heartbeat that a worker sends to the driver's board and does not wait for."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def __call__(self, song_id: str, seconds: float, status: str | None) -> None:
        self.board.hear.remote(song_id, seconds, status)


def start_board() -> Any:
    """The actor that counts finished songs, beside the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.options(scheduling_strategy=here).remote()


def require_loadable(workload: Workload, pools: Pools) -> None:
    """Load the models once in a worker of their own, before songs are blamed for its death.

    Raises: UserError when the worker dies of it, or cannot load them.
    """
    if workload.load is None:
        return
    job = workload.job
    load = _in_a_worker_of_its_own(workload.load, job, pools)
    if _dies(load, job):
        files = ", ".join(sorted({file.path for file in job.weights.values()}))
        files = files or "the networks of f0"
        raise UserError(
            f"a worker process dies while it loads {files}; is there enough memory? "
            f"{pools.most_memory / 2**30:.1f} GB were set aside for it"
        )


def find_killers(workload: Workload, task: Task, pools: Pools) -> set[str]:
    """The songs of a task on which a fresh process dies twice, found one by one.

    Raises: UserError when it dies without any song.
    """
    require_loadable(workload, pools)
    probe = _in_a_worker_of_its_own(workload.probe, workload.job, pools)

    def dies(song_id: str) -> bool:
        return _dies(probe, workload.job, task.index, song_id)

    return {s.song_id for s in task.songs if dies(s.song_id) and dies(s.song_id)}


def _in_a_worker_of_its_own(function: Any, job: Job[Any], pools: Pools) -> Any:
    """The function in a fresh process, with what a worker has that runs the networks."""
    gpus = job.config.workers.gpus_per_worker if pools.gpu else 0
    options = {"num_cpus": pools.cpus, "num_gpus": gpus, "memory": pools.most_memory}
    return ray.remote(max_retries=0, max_calls=1, **options)(function)


def _dies(remote: Any, job: Job[Any], *words: Any) -> bool:
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
