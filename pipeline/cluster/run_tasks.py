"""Running tasks until all are committed, on Ray or in this process.

A round is one pass over the tasks that are left. A task that failed on a storage fault is tried
again. When workers keep dying on a task, its songs are tried one by one, and those that kill a
worker alone are quarantined.

Tested by tests/pipeline/cluster/test_ray_graph.py.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rich.console import Console

from pipeline.cluster.progress import Board, ProgressDisplay, Snapshot
from pipeline.cluster.task_rows import (
    BUG,
    COMMITTED,
    REFUSED,
    STORAGE,
    TaskResult,
    read_result,
    task_row,
)
from pipeline.cluster.workload import Workload
from pipeline.errors import SongBug, StorageFault, UserError, first_names
from pipeline.songs.plan import Task
from pipeline.storage.scratch import Scratch

_STORAGE_WAITS_S = (1.0, 5.0, 25.0)  # before each further try after a storage fault
_ROUNDS_OF_DEATH = 3


@dataclass
class Work:
    """Work that a run did. audio_s: length of its songs by their headers."""

    tasks_run: int = 0
    wall_s: float = 0.0
    start_up_s: float = 0.0
    audio_s: float = 0.0
    stage_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Session:
    """A place to run tasks: this process or a cluster. on_gpu: networks may use GPUs there."""

    run_round: Callable[[dict[int, Task], dict[int, set[str]]], Iterator[TaskResult]]
    snapshot: Callable[[], Snapshot | None]
    find_killers: Callable[[Task], set[str]]
    on_gpu: bool = False


def run_tasks(
    workload: Workload,
    missing: dict[int, Task],
    ray_address: str | None,
    local: bool,
    console: Console,
) -> Work:
    """Commit every task of `missing`. Committed tasks stay, whatever happens to the rest.

    Raises: StorageFault: when the disk or the cluster fails; SongBug: when our code fails on a
    song; UserError: when no worker fits, weights do not load, or scratch folders are not safe.
    """
    work = Work(audio_s=sum(task.duration_s for task in missing.values()))
    started = time.monotonic()
    Scratch(workload.job.config.workers.scratch).close()  # refused here rather than by each worker
    open_session = local_session if local else functools.partial(ray_session, ray_address)
    with open_session(workload, missing) as session:
        work.start_up_s = time.monotonic() - started
        notice = workload.notice(session.on_gpu)
        if notice is not None:
            console.print(f"note: {notice}", highlight=False)
        with ProgressDisplay(console, work.audio_s, session.snapshot):
            run_rounds(session, missing, work)
    work.wall_s = time.monotonic() - started
    return work


def run_rounds(session: Session, missing: dict[int, Task], work: Work) -> None:
    """Run rounds until every task of `missing` is committed."""
    waiting = dict(missing)
    crashed: dict[int, set[str]] = defaultdict(set)
    failures: Counter[int] = Counter()
    deaths: Counter[int] = Counter()
    while waiting:
        reported = set()
        for result in session.run_round(dict(waiting), crashed):
            reported.add(result.task)
            if result.status == BUG:
                raise SongBug(result.detail)
            if result.status == REFUSED:
                raise UserError(result.detail)
            if result.status == STORAGE:
                failures[result.task] += 1
                if result.disk_full or failures[result.task] > len(_STORAGE_WAITS_S):
                    raise StorageFault(result.detail)
            elif result.status == COMMITTED and waiting.pop(result.task, None) is not None:
                work.tasks_run += 1
                for stage, seconds in result.stage_s.items():
                    work.stage_s[stage] += seconds
        for index in sorted(set(waiting) - reported):
            deaths[index] += 1
            if deaths[index] == 1:
                continue  # a lost node takes tasks with it; the next round has new workers
            if deaths[index] > _ROUNDS_OF_DEATH:
                raise StorageFault(
                    f"Workers keep dying on task {index}, although each of its songs succeeds "
                    "alone. Probably too little memory: lower workers.max_workers."
                )
            work.notices.append(f"task {index}: workers died on it; its songs were tried alone")
            killers = session.find_killers(waiting[index])
            crashed[index] |= killers
            if killers:
                work.notices.append(f"workers died on {first_names(sorted(killers))}: quarantined")
        if waiting and failures:
            time.sleep(_STORAGE_WAITS_S[max(failures.values()) - 1])


@contextmanager
def local_session(workload: Workload, missing: dict[int, Task]) -> Iterator[Session]:
    """Open this process as a place to run tasks, one after the other."""
    import pyarrow as pa

    from models.device import resolve_device

    board = Board()
    worker = workload.whole(workload.job, board.record)

    def run_round(tasks: dict[int, Task], crashed: dict[int, set[str]]) -> Iterator[TaskResult]:
        for index in tasks:
            row = pa.Table.from_pylist([task_row(index, crashed.get(index, ()))])
            yield read_result(worker(row))

    try:
        on_gpu = resolve_device("auto") == "cuda"
        yield Session(run_round, board.snapshot, lambda task: set(), on_gpu)
    finally:
        worker.close()


@contextmanager
def ray_session(
    address: str | None, workload: Workload, missing: dict[int, Task]
) -> Iterator[Session]:
    """Open the cluster at `address`, or one on this machine that ends with the run."""
    import ray

    from pipeline.cluster import ray_graph
    from pipeline.cluster.ray_connection import connected

    job = workload.job
    workers = job.config.workers
    threads = max(1, int(workers.cpus_per_worker or 1))  # torch gets its own in the worker
    with connected(address, threads, workers.object_store_gb):
        nodes = [node["Resources"] for node in ray_graph.living_nodes()]
        pools = ray_graph.plan_pools(nodes, missing, workload)
        workload = replace(workload, job=replace(job, threads=pools.threads))
        ray_graph.check_nodes(job.folder, job.corpus, job.weights.values())
        ray_graph.require_loadable(workload, pools)
        board = ray_graph.start_board()

        def snapshot() -> Snapshot | None:
            try:
                return ray.get(board.snapshot.remote(), timeout=5)  # type: ignore[no-any-return]
            except ray.exceptions.RayError:
                return None

        yield Session(
            lambda tasks, crashed: ray_graph.run_graph(workload, tasks, crashed, pools, board),
            snapshot,
            lambda task: ray_graph.find_killers(workload, task, pools),
            pools.gpu > 0,
        )
