"""Rows of the graph: a task goes in, its result comes out.

Tested by tests/pipeline/cluster/test_ray_graph.py.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.storage.atomic import is_disk_full, storage_fault
from stages.chain import StageClock

CRASHED = "a worker process died on this song each time it was tried"  # detail in the ledger
COMMITTED, BUG, STORAGE, REFUSED = "committed", "bug", "storage", "refused"


@dataclass(frozen=True)
class TaskResult:
    """Result of a task. detail: why it was not committed."""

    task: int
    status: str
    detail: str = ""
    disk_full: bool = False
    stage_s: dict[str, float] = field(default_factory=dict)


def task_row(task: int, crashed: Collection[str] = ()) -> dict[str, Any]:
    """Return the row of a task at the start of the graph. crashed: songs that killed a worker."""
    return {"task": task, "crashed": json.dumps(sorted(crashed))}


def read_row(row: pa.Table) -> tuple[int, list[str]]:
    """Return the task, and its songs on which workers died."""
    return row["task"][0].as_py(), json.loads(row["crashed"][0].as_py())


def result_row(result: TaskResult, clips: bytes | None = None) -> pa.Table:
    """Return the row of a result. clips: for the next operator; None: the task is committed."""
    data = pa.array([clips], pa.large_binary())
    return pa.table({"result": [json.dumps(asdict(result))], "clips": data})


def read_result(row: pa.Table) -> TaskResult:
    """Read what `result_row` wrote, without the clips."""
    return TaskResult(**json.loads(row["result"][0].as_py()))


def guarded(task: int, run: Callable[[StageClock], bytes | None]) -> pa.Table:
    """Run a task and return its row. Errors become a row too: the driver decides, not Ray.

    run: returns the clips for the next operator, or None when the task is committed.
    """
    clock = StageClock()
    try:
        clips = run(clock)
        return result_row(TaskResult(task, COMMITTED, stage_s=dict(clock.seconds)), clips)
    except UserError as error:
        return result_row(TaskResult(task, REFUSED, str(error)))
    except OSError as error:
        detail = f"{storage_fault(error)}{_notes(error)}"
        return result_row(TaskResult(task, STORAGE, detail, is_disk_full(error)))
    except Exception as error:  # noqa: BLE001  the driver names the song and stops the run
        detail = "".join(traceback.format_exception(error))
        return result_row(TaskResult(task, BUG, detail))


def _notes(error: BaseException) -> str:
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
