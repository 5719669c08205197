"""The clips of a task: cut from its songs, or as the shard of another dataset has them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cluster.task_rows import CRASHED
from pipeline.cluster.workload import Heartbeat
from pipeline.dataset.ledger import SongEntry, quarantine, settle
from pipeline.dataset.schema import AUDIO_COLUMNS, AUDIO_SCHEMA
from pipeline.dataset.shards import Footer, Origin, read_footer
from pipeline.errors import UserError
from pipeline.extract.config import ExtractConfig
from pipeline.extract.job import ExtractJob, TakenOver
from pipeline.extract.pitch_columns import Pitch, clip_name
from pipeline.songs.plan import PlannedSong, Task, load_plan
from pipeline.songs.source_file import require_mounted
from pipeline.storage.scratch import Scratch
from stages.chain import Clip, PreparedSong, StageClock, prepare_song
from stages.decode import Decoder
from stages.errors import BadInput, Reason


class ClipsOfSongs:
    """A task's songs, decoded and cut into clips; with their pitch, where `pitch` is given."""

    def __init__(self, job: ExtractJob, heartbeat: Heartbeat, pitch: Pitch | None) -> None:
        self.pitch = pitch
        self.job = job
        self.heartbeat = heartbeat
        self.tasks = load_plan(job.folder)
        self.scratch = Scratch(job.config.workers.scratch)
        self.decoder = Decoder(job.config.decode, self.scratch.folder)

    def prepare(
        self, index: int, crashed: Sequence[str], clock: StageClock, only: str | None = None
    ) -> tuple[pa.Table, list[SongEntry]]:
        """Clips (columns of AUDIO_SCHEMA, and of PITCH_SCHEMA with `pitch`) and ledger of a task.

        crashed: songs on which a worker process died; they are quarantined unread.
        only: the one song of the task to look at, for finding out which one kills its worker.
        """
        ledger: list[SongEntry] = []
        tables = []
        for planned in self.tasks[index].songs:
            if only not in (None, planned.song_id):
                continue
            prepare = self._refuse if planned.song_id in crashed else self._prepare
            song, entry = self._settle(planned, functools.partial(prepare, clock=clock))
            with clock.stage("write"):
                clips = _clip_table(planned, song.clips if song else [], self.job.config)
            entries = [entry]
            if self.pitch is not None:
                clips, entries = self.pitch.add(clips, entries, clock)
            tables.append(clips)
            ledger += entries
            self.heartbeat(planned.song_id, planned.duration_s, entries[0].status)
        return pa.concat_tables(tables), ledger

    def _settle(
        self, planned: PlannedSong, prepare: Callable[[bytes], PreparedSong]
    ) -> tuple[PreparedSong | None, SongEntry]:
        path = os.path.join(os.fsencode(self.job.corpus), planned.path)
        try:
            song, entry = settle(planned, path, prepare)
            if entry.reason == Reason.MISSING:
                require_mounted(planned, path, self.job.gone)
            return song, entry
        except Exception as error:
            error.add_note(f"while working on {planned.song_id}")
            raise

    def _prepare(self, path: bytes, clock: StageClock) -> PreparedSong:
        return prepare_song(path, self.decoder, self.job.config, clock)

    def _refuse(self, path: bytes, clock: StageClock) -> PreparedSong:
        raise BadInput(Reason.CRASHED, CRASHED)

    def close(self) -> None:
        self.decoder.close()
        self.scratch.close()


class ClipsOfShard:
    """Clips of a task as the shard of another dataset has them, in place of its songs.

    They keep their samples, and their pitch where it is taken over; else it comes from `pitch`.
    """

    def __init__(
        self, job: ExtractJob, taken_over: TakenOver, heartbeat: Heartbeat, pitch: Pitch | None
    ) -> None:
        self.pitch = pitch
        self.taken_over = taken_over
        self.heartbeat = heartbeat
        self.tasks = load_plan(job.folder)

    def prepare(
        self, index: int, crashed: Sequence[str], clock: StageClock, only: str | None = None
    ) -> tuple[pa.Table, list[SongEntry]]:
        """As `ClipsOfSongs.prepare`; the table has the columns of units that are taken over too."""
        task = self.tasks[index]
        with clock.stage("read"):
            clips, footer = self._read(task)
        wanted = [song for song in task.songs if only in (None, song.song_id)]
        entries = {entry.song_id: entry for entry in footer.ledger}
        for song in wanted:
            if song.song_id in crashed:
                fault = BadInput(Reason.CRASHED, CRASHED)
                entries[song.song_id] = quarantine(song, fault, entries[song.song_id].sha256)
        ledger = [entries[song.song_id] for song in wanted]
        kept = [song.song_id for song in wanted if song.song_id not in crashed]
        clips = clips.filter(pc.is_in(clips["song_id"], pa.array(kept, pa.string())))
        if self.pitch is not None:
            clips, ledger = self.pitch.add(clips, ledger, clock)
        for song, entry in zip(wanted, ledger, strict=True):
            self.heartbeat(song.song_id, song.duration_s, entry.status)
        origin = json.dumps(asdict(origin_of(footer)))
        return clips.replace_schema_metadata({"origin": origin}), ledger

    def _read(self, task: Task) -> tuple[pa.Table, Footer]:
        path = self.taken_over.dataset / "data" / task.shard_name
        try:
            footer = read_footer(path)
            if (footer.task_id, footer.fingerprint) != (task.task_id, self.taken_over.fingerprint):
                raise UserError(f"{path} was made anew while it was read; run this command again")
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return file.read(self.taken_over.columns, use_threads=False), footer
        except FileNotFoundError as error:
            raise UserError(f"{path} was there when this run began and is gone") from error
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged_source(path, error) from error

    def close(self) -> None:
        """There is nothing to close."""


def origin_of(footer: Footer) -> Origin:
    """What a shard made of this one says of it."""
    return Origin(footer.fingerprint, footer.environment)


def damaged_source(path: Path, error: Exception) -> UserError:
    """What to do about a shard of the other dataset that cannot be read."""
    return UserError(
        f"{path} cannot be read ({error}); `cantor verify {path.parent.parent}` tells what else is "
        "damaged there, and `extract` makes a shard again that is deleted"
    )


def _clip_table(planned: PlannedSong, clips: Sequence[Clip], config: ExtractConfig) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in AUDIO_SCHEMA.names}
    for number, clip in enumerate(clips):
        clip_id = clip_name(planned.song_id, number)
        row = {
            "clip_id": clip_id,
            "song_id": planned.song_id,
            "speaker": planned.speaker,
            "clip_index": number,
            "clip_count": len(clips),
            "start": clip.span.start,
            "stop": clip.span.stop,
            "audio": {"bytes": clip.flac, "path": f"{clip_id}.flac"},
            "sample_rate": config.audio.sample_rate,
            "num_samples": clip.span.stop - clip.span.start,
            "loudness_lufs": clip.reading.loudness_lufs,
            "gain_db": clip.reading.gain_db,
            "peak_db": clip.reading.peak_db,
            **{name: getattr(clip.quality, name) for name in AUDIO_COLUMNS},
        }
        for name, value in row.items():
            columns[name].append(value)
    return pa.table(columns, schema=AUDIO_SCHEMA)
