"""The ledger of a conversion: one file for every song, written once its output is durable.

Tested by tests/pipeline/convert/test_folder.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from models.input_file import read_json
from models.synthesizer.json_fields import typed
from pipeline.convert.result import Conversion
from pipeline.errors import UserError
from pipeline.songs.balance import QUARANTINED, Balance
from pipeline.songs.plan import PlannedSong, Task
from pipeline.storage.atomic import commit_file
from stages.errors import BadInput

CONVERTED = "converted"


@dataclass(frozen=True)
class ConvertEntry:
    """The entry of one song.

    size, mtime_ns: of the song's file when it was planned. sha256: of its bytes; None when they
    could not be read. duration_s: length of the song. output: its file, relative to the folder of
    the run.
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
    """A file of the ledger. environment: of the worker that converted the song."""

    task: int
    task_id: str
    fingerprint: str
    environment: dict[str, str]
    entry: ConvertEntry


_DEFAULTS = {
    field.name: list(field.default) if field.name == "notices" else field.default
    for field in fields(ConvertEntry)
    if field.default is not MISSING
}


class ConvertAccount(Balance[ConvertEntry]):
    """The latest entry of every song, and the totals that must balance."""

    @property
    def hours(self) -> float:
        return sum(entry.duration_s for entry in self.entries.values()) / 3600


def converted(
    planned: PlannedSong, sha256: str, output: str, conversion: Conversion
) -> ConvertEntry:
    """Return the entry of a converted song."""
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
    """Return the entry of a song that cannot be converted."""
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
    """Return the task's file in the ledger, relative to the folder of the run."""
    return f"ledger/{task:05d}.json"


def commit_record(folder: Path, record: Record) -> None:
    """Write FOLDER/ledger/TASK.json, whole or not at all.

    Raises: OSError: when the storage fails.
    """
    text = json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n"
    commit_file(folder, record_name(record.task), lambda file: file.write(text.encode()))


def read_records(
    folder: Path, tasks: Mapping[int, Task]
) -> tuple[dict[int, Record], list[UserError]]:
    """Return the ledger by task, and an error for each file of it that cannot be read."""
    records, damaged = {}, []
    for index in tasks:
        path = folder / record_name(index)
        try:
            values = read_json(path)
            entry = {**_DEFAULTS, **values["entry"]}
            records[index] = typed(Record, {**values, "entry": entry}, "")
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError) as error:
            damaged.append(UserError(f"{path} is damaged: {error}"))
    return records, damaged


def is_whole(folder: Path, entry: ConvertEntry) -> bool:
    """Return True when the song's output has the size written, or the song is quarantined."""
    if entry.status == QUARANTINED:
        return True
    try:
        return (folder / entry.output).stat().st_size == entry.output_bytes
    except OSError:
        return False


def balance_conversion(
    folder: Path, tasks: Mapping[int, Task], records: Mapping[int, Record]
) -> ConvertAccount:
    """Balance the plan with the ledger and the outputs: songs = converted + quarantined.

    Everything that does not balance goes into `problems`.
    """
    account = ConvertAccount(planned=len(tasks))
    for index, task in tasks.items():
        (song,) = task.songs
        record = records.get(index)
        if record is None or record.task_id != task.task_id:
            account.problems.append(f"{song.song_id}: it has no entry in the ledger")
        elif record.entry.song_id != song.song_id or song.song_id in account.entries:
            account.problems.append(f"{song.song_id}: its entries in ledger and plan differ")
        else:
            account.entries[song.song_id] = record.entry
            if not is_whole(folder, record.entry):
                output = record.entry.output
                account.problems.append(f"{song.song_id}: {output} is missing or damaged")
    done = account.count(CONVERTED) + account.count(QUARANTINED)
    if done != len(account.entries):
        account.problems.append(f"{len(account.entries) - done} songs have an unknown status")
    return account


def output_names(tasks: Mapping[int, Task], suffix: str) -> dict[int, str]:
    """Return the output of each task, relative to the folder of the run: the song's name, `suffix`.

    Where songs differ in their suffix alone, all but the first keep it before the new one (a.wav,
    a.flac.wav). Since tasks are only ever added, a song keeps its output's name.
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


_LONGEST_NAME = 200  # bytes; file systems take 255, and temporary names are longer


def _safe(part: str) -> str:
    """Return a part of a path that does not lead up, is not hidden and is not too long."""
    visible = part.lstrip(".")
    return visible.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _first_free(whole: str, suffix: str, files: Collection[str], folders: Collection[str]) -> str:
    if any(str(parent) in files for parent in Path(whole).parents):
        whole = whole.replace("/", "_")  # another song's file has the name of the folder
    further = (f"{whole}-{number}" for number in itertools.count(2))
    choices = itertools.chain([str(Path(whole).with_suffix("")), whole], further)
    names = (f"{choice}{suffix}" for choice in choices)
    return next(name for name in names if name not in files and name not in folders)
