"""What became of every song: one entry each, in the footer of the shard that its task wrote.

`settle` is where a song's own faults (`BadInput`) end.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from stages.errors import BadInput, Dropped, Reason
from stages.open_file import open_source

if TYPE_CHECKING:
    from pipeline.dataset.shards import Footer
    from pipeline.songs.plan import PlannedSong, Task
    from stages.chain import PreparedSong

KEPT, FILTERED, QUARANTINED = "kept", "filtered", "quarantined"


@dataclass(frozen=True)
class SongEntry:
    """What became of one song. Seconds are of the resampled song."""

    song_id: str
    speaker: str
    status: str  # kept | filtered | quarantined
    reason: str | None
    detail: str | None
    clips: int
    duration_s: float
    kept_s: float
    dropped: list[Dropped]
    size: int
    mtime_ns: int
    sha256: str | None  # of the source file; None when it could not be read
    source: str | None  # "44100 Hz, 2 ch, FLAC"

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SongEntry:
        dropped = [
            Dropped(Reason(d["reason"]), d["clips"], d["seconds"]) for d in values["dropped"]
        ]
        return SongEntry(**{**values, "dropped": dropped})


def settle(
    planned: PlannedSong, path: bytes, prepare: Callable[[bytes], PreparedSong]
) -> tuple[PreparedSong | None, SongEntry]:
    """Run `prepare` on a song and write its entry; the song is None when nothing was kept.

    Raises: whatever is not the song's own fault.
    """
    sha256 = None
    try:
        sha256 = check_unchanged(planned, path)
        song = prepare(path)
    except BadInput as fault:
        return None, quarantine(planned, fault, sha256)
    reason, detail = (None, song.note or None) if song.clips else song.why_empty()
    kept_samples = sum(clip.span.stop - clip.span.start for clip in song.clips)
    header = song.header
    entry = SongEntry(
        planned.song_id,
        planned.speaker,
        KEPT if song.clips else FILTERED,
        reason,
        detail,
        clips=len(song.clips),
        duration_s=song.duration_s,
        kept_s=kept_samples / song.sample_rate,
        dropped=song.dropped,
        size=planned.size,
        mtime_ns=planned.mtime_ns,
        sha256=sha256,
        source=f"{header.sample_rate} Hz, {header.channels} ch, {header.format}",
    )
    return (song if song.clips else None), entry


def quarantine(planned: PlannedSong, fault: BadInput, sha256: str | None) -> SongEntry:
    """The entry of a song that is at fault. sha256: of its file, if that could be read."""
    return SongEntry(
        planned.song_id,
        planned.speaker,
        QUARANTINED,
        fault.reason,
        fault.detail,
        clips=0,
        duration_s=0.0,
        kept_s=0.0,
        dropped=[],
        size=planned.size,
        mtime_ns=planned.mtime_ns,
        sha256=sha256,
        source=None,
    )


def hash_source(path: bytes) -> tuple[os.stat_result, str]:
    """Status and SHA-256 (hex) of a source file.

    Raises: BadInput for what is wrong with the file, OSError for what is wrong with the storage.
    """
    with open(open_source(path), "rb") as file:
        return os.fstat(file.fileno()), hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(planned: PlannedSong, path: bytes) -> str:
    """SHA-256 of the source file. Raises: BadInput where it is not the one that was planned."""
    stat, sha256 = hash_source(path)
    if (stat.st_size, stat.st_mtime_ns) != (planned.size, planned.mtime_ns):
        raise BadInput(
            Reason.CHANGED,
            f"{stat.st_size} bytes now, {planned.size} when it was planned; "
            "--retry-quarantined takes it as it is",
        )
    return sha256


class Fate(Protocol):
    """What every entry of a ledger says of its song."""

    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


E = TypeVar("E", bound=Fate)


@dataclass
class Balance(Generic[E]):
    """The latest entry of every song, and what does not balance."""

    planned: int = 0
    entries: dict[str, E] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries.values())

    def reasons(self, status: str) -> Counter[str]:
        return Counter(
            entry.reason or "" for entry in self.entries.values() if entry.status == status
        )


@dataclass
class Account(Balance[SongEntry]):
    """Of a dataset."""

    shards: int = 0

    def dropped_s(self) -> dict[str, float]:
        """Seconds left out of readable songs, by reason."""
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
        """Songs of one content under several names."""
        names: dict[str, list[str]] = defaultdict(list)
        for entry in self.entries.values():
            if entry.sha256 is not None and entry.size > 0:
                names[entry.sha256].append(entry.song_id)
        return sorted(sorted(group) for group in names.values() if len(group) > 1)


def take_account(tasks: Sequence[Task], footers: Iterable[tuple[Footer, int]]) -> Account:
    """Balance of the plan against (footer, rows of the shard) of every committed shard.

    planned songs = kept + filtered + quarantined; decoded seconds = kept + dropped for each song;
    clips in ledgers = rows. What does not balance stands in `problems`.
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
        names = [entry.song_id for entry in footer.ledger]
        if names != [song.song_id for song in task.songs]:
            account.problems.append(f"{where}: the ledger does not list the planned songs")
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


def entry_record(entry: SongEntry) -> dict[str, Any]:
    """A flat row for the exported table."""
    record = asdict(entry)
    record["dropped"] = "; ".join(f"{d.reason} {d.seconds:.2f} s" for d in entry.dropped)
    return record
