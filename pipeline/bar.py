"""A bar for work of known length: on a terminal it moves, in a log it is a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def show_bar(
    console: Console, title: str, total: int | None, done: int = 0, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many steps were done since the last call.

    total: steps, None where nobody knows. done: those before the start.
    """
    if not console.is_terminal:
        yield _lines(console, title, total, done)
        return
    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        row = progress.add_task(title, total=total, completed=done)
        yield lambda steps: progress.update(row, advance=steps)


def _lines(console: Console, title: str, total: int | None, done: int) -> Callable[[int], None]:
    due = time.monotonic() + _LOG_EVERY_S

    def advance(steps: int) -> None:
        nonlocal done, due
        done += steps
        if time.monotonic() >= due:
            due = time.monotonic() + _LOG_EVERY_S
            share = f"{done / total:.0%}" if total else f"{done}"
            console.print(f"{title}: {share}", highlight=False, markup=False)

    return advance
