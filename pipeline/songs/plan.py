"""Songs into tasks: written once before any work, append-only afterwards.

A plan is a pure function of the songs (names, sizes, header durations) and of `task_minutes`, so
two machines make the same plan for the same corpus. Later files add tasks. A task index that comes
again in a later file replaces the earlier task, whose songs changed.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.input_file import require_regular
from pipeline.errors import UserError, one_line
from pipeline.songs.corpus import Corpus, ListedSong
from pipeline.songs.manifest import SPLIT_NAME
from pipeline.storage.atomic import commit_file
from stages.decode import DecodeConfig, Decoder
from stages.errors import BadInput

# Every song costs this much besides its length, so that broken files (0 s) spread over tasks too.
_SONG_OVERHEAD_S = 1.0

PLAN_SCHEMA = pa.schema(
    [
        ("task", pa.int32()),
        ("split", pa.string()),
        ("song_id", pa.string()),
        ("speaker", pa.string()),
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("duration_s", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class PlannedSong:
    """A song as it was planned. duration_s: from its header; 0 when that is unreadable."""

    song_id: str
    speaker: str
    path: bytes
    size: int
    mtime_ns: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Task:
    """A fixed, ordered group of songs that becomes one shard."""

    index: int
    split: str
    songs: tuple[PlannedSong, ...]

    @property
    def duration_s(self) -> float:
        return math.fsum(song.duration_s for song in self.songs)

    @property
    def shard_name(self) -> str:
        return f"{self.split}-{self.index:05d}.parquet"

    @property
    def task_id(self) -> str:
        """Identity of the task's songs; the shard of the task has the same in its footer."""
        digest = hashlib.sha256()
        for song in self.songs:
            digest.update(repr((song.song_id, song.speaker, song.size, song.mtime_ns)).encode())
        return f"{self.index}-{digest.hexdigest()[:16]}"


def default_task_minutes(corpus_minutes: float) -> float:
    """Return the minutes of audio in a task: a 64th of the corpus, within 1 and 20.

    Small corpora still spread over the cores of a workstation, and a shard of 20 minutes (50 MB of
    FLAC) keeps the work lost to a dead worker, and its memory, small.
    """
    return min(20.0, max(1.0, corpus_minutes / 64.0))


def make_tasks(
    songs: Iterable[tuple[str, PlannedSong]], task_minutes: float, first_index: int = 0
) -> list[Task]:
    """Return balanced tasks of about `task_minutes`, longest first, from (split, song) pairs.

    Longest-processing-time rule: each song, longest first, goes to the shortest task so far.
    """
    by_split: dict[str, list[PlannedSong]] = defaultdict(list)
    for split, song in songs:
        by_split[split].append(song)
    groups: list[tuple[float, str, list[PlannedSong]]] = []
    for split, members in sorted(by_split.items()):
        members.sort(key=lambda song: (-song.duration_s, song.song_id))
        total_s = math.fsum(song.duration_s + _SONG_OVERHEAD_S for song in members)
        count = min(len(members), max(1, math.ceil(total_s / (60.0 * task_minutes))))
        heap = [(0.0, number) for number in range(count)]
        bins: list[list[PlannedSong]] = [[] for _ in range(count)]
        loads = [0.0] * count
        for song in members:
            load, number = heapq.heappop(heap)
            bins[number].append(song)
            loads[number] = load + song.duration_s + _SONG_OVERHEAD_S
            heapq.heappush(heap, (loads[number], number))
        groups += [(load, split, group) for load, group in zip(loads, bins, strict=True)]
    groups.sort(key=lambda group: (-group[0], group[1], group[2][0].song_id))
    return [
        Task(first_index + number, split, tuple(members))
        for number, (_, split, members) in enumerate(groups)
    ]


def plan_files(dataset: Path) -> list[Path]:
    """Return the files of the plan, oldest first."""
    return sorted((dataset / "plan").glob("plan-*.parquet"))


def append_plan(dataset: Path, tasks: Sequence[Task]) -> Path:
    """Write `tasks` as the next plan file, atomically."""
    rows: dict[str, list[object]] = {name: [] for name in PLAN_SCHEMA.names}
    for task in tasks:
        for song in task.songs:
            rows["task"].append(task.index)
            rows["split"].append(task.split)
            for name in ("song_id", "speaker", "path", "size", "mtime_ns", "duration_s"):
                rows[name].append(getattr(song, name))
    name = f"plan/plan-{len(plan_files(dataset)):05d}.parquet"
    table = pa.table(rows, schema=PLAN_SCHEMA)
    return commit_file(dataset, name, lambda file: pq.write_table(table, file, compression="zstd"))


def load_plan(dataset: Path) -> dict[int, Task]:
    """Return the tasks by index, in order; later plan files replace tasks of the same index."""
    tasks: dict[int, Task] = {}
    for path in plan_files(dataset):
        columns = _read_plan_file(path)
        groups: dict[int, list[PlannedSong]] = defaultdict(list)
        splits: dict[int, str] = {}
        for i, task in enumerate(columns["task"]):
            splits[task] = columns["split"][i]
            groups[task].append(
                PlannedSong(
                    columns["song_id"][i],
                    columns["speaker"][i],
                    columns["path"][i],
                    columns["size"][i],
                    columns["mtime_ns"][i],
                    columns["duration_s"][i],
                )
            )
        for index, songs in groups.items():
            tasks[index] = Task(index, splits[index], tuple(songs))
    return dict(sorted(tasks.items()))


def _read_plan_file(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a plan file.

    Raises: UserError: when it is damaged; OSError: when the storage fails.
    """
    try:
        require_regular(path)
        table = pq.read_table(path)
        table.validate(full=True)
        if not table.schema.equals(PLAN_SCHEMA):
            raise ValueError("it has other columns than a plan")
        columns: dict[str, list[Any]] = table.to_pydict()
        if any(column.null_count for column in table.columns):
            raise ValueError("it has empty cells")
        if not all(map(SPLIT_NAME.fullmatch, columns["split"])):
            raise ValueError("a split has other characters than letters, digits and _")
        if not all(math.isfinite(seconds) and seconds >= 0 for seconds in columns["duration_s"]):
            raise ValueError("a duration is not a number of seconds")
        if min(columns["task"], default=0) < 0:
            raise ValueError("a task has a number below 0")
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{path} is damaged: {one_line(error)}; restore it from a copy, or make "
            "the dataset again with --force-new"
        ) from error
    return columns


def plan_songs(
    corpus: Corpus, sources: Sequence[ListedSong], decode: DecodeConfig, scratch_folder: str | None
) -> dict[str, tuple[str, PlannedSong]]:
    """Return (split, song) by song_id, with durations from the headers.

    A limited child process reads them. A header that it cannot read gives 0 s: the song is planned,
    and quarantined when it is decoded.
    """
    from pipeline.storage.scratch import Scratch

    scratch = Scratch(scratch_folder)
    songs = {}
    try:
        with Decoder(decode, scratch.folder) as decoder:
            root = os.fsencode(corpus.root)
            paths = (os.path.join(root, source.path) for source in sources)
            headers = decoder.probe_many(paths)
            for source, header in zip(sources, headers, strict=True):
                duration_s = 0.0 if isinstance(header, BadInput) else header.duration_s
                song = PlannedSong(
                    source.song_id,
                    source.speaker,
                    source.path,
                    source.size,
                    source.mtime_ns,
                    duration_s,
                )
                songs[source.song_id] = (source.split, song)
    finally:
        scratch.close()
    return songs
