"""What became of every converted song: one file each, written once its output is durable."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.convert.result import Conversion
from pipeline.errors import UserError
from pipeline.songs.balance import QUARANTINED, Balance
from pipeline.songs.plan import PlannedSong, Task
from pipeline.storage.atomic import commit_file
from stages.errors import BadInput

CONVERTED = "converted"


@dataclass(frozen=True)
class ConvertEntry:
    """What became of one song.

    size, mtime_ns: of the song's file when it was planned. sha256: of its bytes; None when they
    could not be read. duration_s: of the song. output: its file, from the folder of the run.
    """

    song_id: str
    status: str  # converted | quarantined
    reason: str | None
    detail: str | None
    size: int
    mtime_ns: int
    sha256: str | None
    output: str
    output_bytes: int = 0
    duration_s: float = 0.0
    pieces: int = 0
    gain_db: float = 0.0
    peak: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """A file of the ledger. environment: of the worker that did the song."""

    task: int
    task_id: str
    fingerprint: str
    environment: dict[str, str]
    entry: ConvertEntry


class ConvertAccount(Balance[ConvertEntry]):
    """The latest entry of every song, and the totals that must balance."""

    @property
    def hours(self) -> float:
        return sum(entry.duration_s for entry in self.entries.values()) / 3600


def converted(
    planned: PlannedSong, sha256: str, output: str, conversion: Conversion
) -> ConvertEntry:
    return ConvertEntry(
        planned.song_id,
        CONVERTED,
        None,
        None,
        planned.size,
        planned.mtime_ns,
        sha256,
        output,
        output_bytes=conversion.output.stat().st_size,
        duration_s=conversion.duration_s,
        pieces=conversion.pieces,
        gain_db=conversion.gain_db,
        peak=conversion.peak,
        wall_s=conversion.wall_s,
        cpu_s=conversion.cpu_s,
        notices=conversion.notices,
    )


def quarantined(
    planned: PlannedSong, sha256: str | None, output: str, fault: BadInput
) -> ConvertEntry:
    return ConvertEntry(
        planned.song_id,
        QUARANTINED,
        fault.reason,
        fault.detail,
        planned.size,
        planned.mtime_ns,
        sha256,
        output,
    )


def record_name(task: int) -> str:
    """Of the task's file, from the folder of the run."""
    return f"ledger/{task:05d}.json"


def commit_record(folder: Path, record: Record) -> None:
    """Write FOLDER/ledger/TASK.json, whole or not at all. Raises: OSError of the storage."""
    text = json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n"
    commit_file(folder, record_name(record.task), lambda file: file.write(text.encode()))


def read_records(
    folder: Path, tasks: Mapping[int, Task]
) -> tuple[dict[int, Record], list[UserError]]:
    """The ledger by task, and what of it cannot be read."""
    records, damaged = {}, []
    for index in tasks:
        path = folder / record_name(index)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["entry"]["notices"] = tuple(values["entry"]["notices"])
            records[index] = Record(**{**values, "entry": ConvertEntry(**values["entry"])})
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError) as error:
            damaged.append(UserError(f"{path} is damaged: {error}"))
    return records, damaged


def is_whole(folder: Path, entry: ConvertEntry) -> bool:
    """The song's output is there as it was written, or there is none by right."""
    if entry.status == QUARANTINED:
        return True
    try:
        return (folder / entry.output).stat().st_size == entry.output_bytes
    except OSError:
        return False


def balance_conversion(
    folder: Path, tasks: Mapping[int, Task], records: Mapping[int, Record]
) -> ConvertAccount:
    """Balance of the plan against the ledger and the outputs: songs = converted + quarantined.

    What does not balance stands in `problems`.
    """
    account = ConvertAccount(planned=len(tasks))
    for index, task in tasks.items():
        (song,) = task.songs
        record = records.get(index)
        if record is None or record.task_id != task.task_id:
            account.problems.append(f"{song.song_id}: the ledger has no entry of it")
        elif record.entry.song_id != song.song_id or song.song_id in account.entries:
            account.problems.append(f"{song.song_id}: the ledger and the plan do not agree")
        else:
            account.entries[song.song_id] = record.entry
            if not is_whole(folder, record.entry):
                account.problems.append(f"{song.song_id}: {record.entry.output} is not whole")
    done = account.count(CONVERTED) + account.count(QUARANTINED)
    if done != len(account.entries):
        account.problems.append(f"{len(account.entries) - done} songs have an unknown status")
    return account


def output_names(tasks: Mapping[int, Task], suffix: str) -> dict[int, str]:
    """The file of each task's song, from the folder of the run: the song's own, with `suffix`.

    Of songs that differ in their suffix alone, all but the one of the first task keep it before
    the new one (a.wav, a.flac.wav). As tasks are only ever added, a song keeps its name.
    """
    names: dict[int, str] = {}
    files: set[str] = set()
    folders: set[str] = set()
    for index, task in sorted(tasks.items()):
        parts = [_safe(part) for part in task.songs[0].song_id.split("/")]
        whole = "/".join(filter(None, parts)) or "song"
        name = _first_free(whole, suffix, files, folders)
        names[index] = name
        files.add(name)
        folders.update(str(parent) for parent in Path(name).parents)
    return names


_LONGEST_NAME = 200  # bytes; file systems take 255, and a file that is written has a longer one


def _safe(part: str) -> str:
    """Of a path: neither up nor hidden, nor longer than a file system takes."""
    visible = part.lstrip(".")
    return visible.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _first_free(whole: str, suffix: str, files: Collection[str], folders: Collection[str]) -> str:
    if any(str(parent) in files for parent in Path(whole).parents):
        whole = whole.replace("/", "_")  # a folder has the name of another song's file
    further = (f"{whole}-{number}" for number in itertools.count(2))
    choices = itertools.chain([str(Path(whole).with_suffix("")), whole], further)
    names = (f"{choice}{suffix}" for choice in choices)
    return next(name for name in names if name not in files and name not in folders)
