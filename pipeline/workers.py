"""What runs in a worker: the CPU half of a task, the units half, and both composed.

The classes take and give one-row Arrow tables, as Ray Data hands them out, and are called in the
driver's own process for `--local` and in tests.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.halves import CpuHalf, UnitsHalf
from pipeline.job import Heartbeat, Job
from pipeline.ledger import SongEntry
from pipeline.shards import (
    is_disk_full,
    storage_fault,
)
from stages.chain import StageClock

COMMITTED, BUG, STORAGE, REFUSED = "committed", "bug", "storage", "refused"


@dataclass(frozen=True)
class TaskResult:
    """What a worker reports of a task; `detail` says why it was not committed."""

    task: int
    status: str
    detail: str = ""
    disk_full: bool = False
    stage_s: dict[str, float] = field(default_factory=dict)


class PrepareTask:
    """The CPU operator before a GPU operator: the clips travel as one Arrow IPC buffer."""

    def __init__(self, job: Job, heartbeat: Heartbeat) -> None:
        self.job = job
        self.heartbeat = heartbeat

    @functools.cached_property
    def cpu(self) -> CpuHalf:
        return CpuHalf(self.job, self.heartbeat)

    def __call__(self, row: pa.Table) -> pa.Table:
        task, crashed = _unpack_row(row)
        return _guarded(task, lambda clock: self._run(task, crashed, clock))

    def _run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        clips, ledger = self.cpu.prepare(task, crashed, clock)
        entries = json.dumps([asdict(entry) for entry in ledger])
        clips = clips.replace_schema_metadata({**(clips.schema.metadata or {}), "ledger": entries})
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, clips.schema) as stream:
            stream.write_table(clips)
        return bytes(buffer.getvalue())

    def close(self) -> None:
        if "cpu" in self.__dict__:  # made at the first task
            self.cpu.close()


class ExtractTask(PrepareTask):
    """A whole task, row in and row out: the one operator of a cluster without GPUs."""

    @functools.cached_property
    def units(self) -> UnitsHalf:
        return UnitsHalf(self.job)

    def _run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        self.units.finish(task, *self.cpu.prepare(task, crashed, clock), clock)
        return None


class FinishTask:
    """The GPU operator: units of what `PrepareTask` sent, and the commit."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @functools.cached_property
    def units(self) -> UnitsHalf:
        return UnitsHalf(self.job)

    def __call__(self, row: pa.Table) -> pa.Table:
        before = read_result(row)
        if before.status != COMMITTED:
            return result_row(before)

        def run(clock: StageClock) -> None:
            clock.seconds.update(before.stage_s)
            clips = pa.ipc.open_stream(row["clips"][0].as_buffer()).read_all()
            entries = json.loads(clips.schema.metadata[b"ledger"])
            ledger = [SongEntry.from_dict(entry) for entry in entries]
            self.units.finish(before.task, clips, ledger, clock)

        return _guarded(before.task, run)


def probe_song(job: Job, task: int, song_id: str) -> None:
    """One song through both halves, nothing written: does it kill the process?"""
    cpu, clock = CpuHalf(job, lambda *_: None), StageClock()
    try:
        clips, ledger = cpu.prepare(task, (), clock, only=song_id)
        UnitsHalf(job).complete(clips, ledger, clock)
    finally:
        cpu.close()


def load_models(job: Job) -> None:
    """Everything a worker loads, for finding out whether that kills it."""
    UnitsHalf(job)


def task_row(task: int, crashed: Collection[str] = ()) -> dict[str, Any]:
    """The row that stands for a task at the start of the graph."""
    return {"task": task, "crashed": json.dumps(sorted(crashed))}


def _unpack_row(row: pa.Table) -> tuple[int, list[str]]:
    return row["task"][0].as_py(), json.loads(row["crashed"][0].as_py())


def result_row(result: TaskResult, clips: bytes | None = None) -> pa.Table:
    data = pa.array([clips], pa.large_binary())
    return pa.table({"result": [json.dumps(asdict(result))], "clips": data})


def read_result(row: pa.Table) -> TaskResult:
    return TaskResult(**json.loads(row["result"][0].as_py()))


def _guarded(task: int, run: Callable[[StageClock], bytes | None]) -> pa.Table:
    """The row a task gives. Its faults become a row too: the driver decides, Ray does not retry.

    run: gives the clips that the next operator is to finish, or None when the task is committed.
    """
    clock = StageClock()
    try:
        clips = run(clock)
        return result_row(TaskResult(task, COMMITTED, stage_s=dict(clock.seconds)), clips)
    except UserError as error:
        return result_row(TaskResult(task, REFUSED, str(error)))
    except OSError as error:
        words = f"{storage_fault(error)}{_notes(error)}"
        return result_row(TaskResult(task, STORAGE, words, is_disk_full(error)))
    except Exception as error:  # noqa: BLE001  the driver names the song and stops the run
        words = "".join(traceback.format_exception(error))
        return result_row(TaskResult(task, BUG, words))


def _notes(error: BaseException) -> str:
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
