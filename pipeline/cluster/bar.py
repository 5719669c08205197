"""A progress bar on a terminal, a line now and then in a log.

Tested by tests/pipeline/tools/test_fetch.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LOG_EVERY_S = 30.0


class Advance(Protocol):
    """Moves the bar by the steps done since the last call. note: shown beside the title."""

    def __call__(self, steps: int, note: str = "") -> None: ...


@contextmanager
def show_bar(
    console: Console, title: str, total: int | None, done: int = 0, in_bytes: bool = False
) -> Iterator[Advance]:
    """Show a bar. total: steps; None: unknown. done: steps before the start."""
    if not console.is_terminal:
        yield _lines(console, title, total, done)
        return
    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        row = progress.add_task(title, total=total, completed=done)

        def advance(steps: int, note: str = "") -> None:
            progress.update(row, advance=steps, description=f"{title} {note}".strip())

        yield advance


def _lines(console: Console, title: str, total: int | None, done: int) -> Advance:
    due = time.monotonic() + _LOG_EVERY_S

    def advance(steps: int, note: str = "") -> None:
        nonlocal done, due
        done += steps
        if time.monotonic() >= due:
            due = time.monotonic() + _LOG_EVERY_S
            share = f"{done / total:.0%}" if total else f"{done}"
            words = f"{title}: {share} {note}".strip()
            console.print(words, highlight=False, markup=False)

    return advance
