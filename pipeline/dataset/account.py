"""The balance of a dataset: plan, ledgers and rows.

Tested by tests/pipeline/extract/test_command.py, tests/pipeline/dataset/test_shards.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.songs.balance import KEPT, Balance

if TYPE_CHECKING:
    from pipeline.dataset.shards import Footer
    from pipeline.songs.plan import Task
from pipeline.dataset.ledger import SongEntry


@dataclass
class Account(Balance[SongEntry]):
    """The balance of a dataset."""

    shards: int = 0

    def dropped_s(self) -> dict[str, float]:
        """Sum the seconds left out of readable songs, by reason."""
        seconds: dict[str, float] = defaultdict(float)
        for entry in self.entries.values():
            for drop in entry.dropped:
                seconds[drop.reason] += drop.seconds
        return dict(seconds)

    @property
    def clips(self) -> int:
        return sum(entry.clips for entry in self.entries.values())

    @property
    def hours_in(self) -> float:
        return sum(entry.duration_s for entry in self.entries.values()) / 3600

    @property
    def hours_kept(self) -> float:
        return sum(entry.kept_s for entry in self.entries.values()) / 3600

    def duplicates(self) -> list[list[str]]:
        """Group the names of songs with the same content."""
        names: dict[str, list[str]] = defaultdict(list)
        for entry in self.entries.values():
            if entry.sha256 is not None and entry.size > 0:
                names[entry.sha256].append(entry.song_id)
        return sorted(sorted(group) for group in names.values() if len(group) > 1)


def balance_dataset(tasks: Sequence[Task], footers: Iterable[tuple[Footer, int]]) -> Account:
    """Balance the plan against (footer, rows of the shard) of every committed shard.

    planned songs = kept + filtered + quarantined; decoded seconds = kept + dropped for each song;
    clips in ledgers = rows. `problems` lists what does not balance.
    """
    account = Account(planned=len({song.song_id for task in tasks for song in task.songs}))
    by_task = {task.index: task for task in tasks}
    for footer, rows in sorted(footers, key=lambda pair: pair[0].task):
        account.shards += 1
        where = f"task {footer.task}"
        task = by_task.get(footer.task)
        if task is None or task.task_id != footer.task_id:
            account.problems.append(f"{where}: its shard is not the one that was planned")
            continue
        names = [(entry.song_id, entry.speaker) for entry in footer.ledger]
        if names != [(song.song_id, song.speaker) for song in task.songs]:
            account.problems.append(
                f"{where}: the ledger does not list the planned songs and speakers"
            )
        if sum(entry.clips for entry in footer.ledger) != rows:
            account.problems.append(f"{where}: {rows} rows, but the ledger says otherwise")
        for entry in footer.ledger:
            parts = entry.kept_s + sum(drop.seconds for drop in entry.dropped)
            if abs(parts - entry.duration_s) > 1e-6 * max(1.0, entry.duration_s):
                account.problems.append(
                    f"{entry.song_id}: {entry.duration_s:.6f} s decoded, {parts:.6f} s accounted"
                )
            before = account.entries.get(entry.song_id)
            if before is not None and before.status == KEPT:
                account.problems.append(f"{entry.song_id}: kept by more than one task")
            account.entries[entry.song_id] = entry
    missing = account.planned - len(account.entries)
    if missing:
        account.problems.append(f"{missing} planned songs have no ledger entry")
    return account
