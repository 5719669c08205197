"""The skeleton of a run that may be stopped at any point and resumed by the same command.

    list -> lock -> same settings? -> plan: what is missing -> begin -> run -> balance

Extraction, the conversion of a folder and distillation are such runs. Each describes its steps in
the methods of `ResumableRun`; this module has their order. All that may refuse a run comes before
`begin`, the first step that writes, except that the lock makes the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pipeline.cluster.run_tasks import Work
from pipeline.songs.plan import Task
from pipeline.storage.atomic import sweep
from pipeline.storage.lock import lock

P = TypeVar("P")
R_co = TypeVar("R_co", covariant=True)
C = TypeVar("C")
A = TypeVar("A")


class ResumableRun(Protocol[P, R_co]):
    """The steps of a run that fills `folder`, in order. P: its plan. R: its result."""

    @property
    def folder(self) -> Path: ...

    def list_inputs(self) -> None:
        """List what the run reads. Raises: UserError: when there is nothing."""
        ...

    def check_settings(self) -> None:
        """Compare the settings with those that the folder was begun with.

        Raises: UserError: when they differ, or when the folder is not of this program.
        """
        ...

    def plan(self) -> P:
        """Return what is committed and what is missing. Writes nothing."""
        ...

    def begin(self, plan: P) -> None:
        """Write the settings and the plan."""
        ...

    def run(self, plan: P) -> None:
        """Do what is missing, each part committed by one atomic rename."""
        ...

    def balance(self, plan: P) -> R_co:
        """Compare what is there with the plan, and return the result."""
        ...


def complete(run: ResumableRun[P, R_co]) -> R_co:
    """Make or complete the folder of a run.

    Raises: UserError: when a step refuses, or another process has the folder.
    """
    run.list_inputs()
    with lock(run.folder):
        run.check_settings()
        plan = run.plan()
        sweep(run.folder)
        run.begin(plan)
        run.run(plan)
        return run.balance(plan)


def preview(run: ResumableRun[P, R_co]) -> P:
    """Return the plan of a run without writing anything.

    Raises: UserError: when a step refuses.
    """
    run.list_inputs()
    run.check_settings()
    return run.plan()


@dataclass(frozen=True)
class TaskPlan(Generic[C]):
    """The plan of a run whose work is tasks.

    tasks: all of them, by index. added: tasks that no plan file has yet, new or in place of others.
    committed: what each finished task left behind, by index.
    gone: planned songs that are not there now.
    threads: threads of the workers that made the committed part; None: they differ, or are set.
    """

    tasks: dict[int, Task]
    added: list[Task]
    committed: dict[int, C]
    gone: frozenset[str]
    threads: int | None

    @property
    def missing(self) -> dict[int, Task]:
        """Tasks that are still to do."""
        return {index: task for index, task in self.tasks.items() if index not in self.committed}

    @property
    def missing_hours(self) -> float:
        """Hours of audio in the missing tasks."""
        return sum(task.duration_s for task in self.missing.values()) / 3600


def with_added(tasks: dict[int, Task], added: list[Task]) -> dict[int, Task]:
    """Return `tasks` with further ones, or other ones in their place, by index and in order."""
    return dict(sorted((tasks | {task.index: task for task in added}).items()))


@dataclass
class TaskOutcome(Generic[A]):
    """Result of a run whose work is tasks, for its summary. account: the balance."""

    account: A
    work: Work
    notices: list[str]
