"""Clips of a task: sliced from its songs, or taken over from the shard of another dataset."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cluster.task_rows import CRASHED
from pipeline.dataset.clip_checks import audio_faults, identity_faults, require_columns
from pipeline.dataset.decoded_clips import DecodedClips
from pipeline.dataset.ledger import SongEntry, prepared_entry, quarantined_entry
from pipeline.dataset.schema import AUDIO_SCHEMA, clip_name
from pipeline.dataset.shards import Footer, Origin, read_footer
from pipeline.errors import UserError, name_song_in_errors, one_line
from pipeline.extract.config import ExtractConfig
from pipeline.extract.job import ExtractJob, TakenOver
from pipeline.songs.plan import PlannedSong, Task
from pipeline.songs.source_file import check_unchanged, require_mounted
from pipeline.storage.scratch import Scratch
from stages.chain import Clip, StageClock, prepare_song
from stages.decode import Decoder
from stages.errors import BadInput, Reason
from stages.quality import measure_quality


@dataclass(frozen=True)
class SongClips:
    """Clips of one song and its ledger entry.

    clips: columns of AUDIO_SCHEMA, and those taken over. origin: the shard that they come from.
    """

    planned: PlannedSong
    clips: pa.Table
    entry: SongEntry
    origin: Origin | None = None


class ClipSource(Protocol):
    """Something that gives the clips of a task, song by song."""

    def read(
        self, task: Task, songs: Sequence[PlannedSong], crashed: Collection[str], clock: StageClock
    ) -> Iterator[SongClips]:
        """Yield the clips of each of `songs`, which belong to `task`, in order.

        crashed: ids of songs on which a worker process died; they are quarantined.
        """
        ...

    def close(self) -> None: ...


def open_clip_source(job: ExtractJob) -> ClipSource:
    """Return the songs of the corpus as a source, or the dataset that is taken over."""
    return ClipsOfSongs(job) if job.taken_over is None else ClipsOfShards(job, job.taken_over)


class ClipsOfSongs:
    """Clips of songs of a corpus: decoded, sliced, normalised."""

    def __init__(self, job: ExtractJob) -> None:
        self.job = job
        self.scratch = Scratch(job.config.workers.scratch)
        self.decoder = Decoder(job.config.decode, self.scratch.folder)

    def read(
        self, task: Task, songs: Sequence[PlannedSong], crashed: Collection[str], clock: StageClock
    ) -> Iterator[SongClips]:
        for planned in songs:
            with name_song_in_errors(planned.song_id):
                song = self._read_song(planned, planned.song_id in crashed, clock)
            yield song

    def _read_song(self, planned: PlannedSong, crashed: bool, clock: StageClock) -> SongClips:
        """Prepare a song. Faults of the song itself end here, as a quarantined entry."""
        path = os.path.join(os.fsencode(self.job.corpus), planned.path)
        config, sha256 = self.job.config, None
        try:
            sha256 = check_unchanged(planned, path)
            if crashed:
                raise BadInput(Reason.CRASHED, CRASHED)
            song = prepare_song(path, self.decoder, config, clock)
        except BadInput as fault:
            if fault.reason == Reason.MISSING:
                require_mounted(planned, path, self.job.gone)
            entry = quarantined_entry(planned, fault, sha256)
            return SongClips(planned, _clip_table(planned, [], config), entry)
        with clock.stage("write"):
            clips = _clip_table(planned, song.clips, config)
        return SongClips(planned, clips, prepared_entry(planned, song, sha256))

    def close(self) -> None:
        self.decoder.close()
        self.scratch.close()


class ClipsOfShards:
    """Clips that the shards of another dataset hold, with their samples as they are.

    The shard of a task has the task's index, split and songs.
    """

    def __init__(self, job: ExtractJob, taken_over: TakenOver) -> None:
        self.audio = job.config.audio
        self.taken_over = taken_over

    def read(
        self, task: Task, songs: Sequence[PlannedSong], crashed: Collection[str], clock: StageClock
    ) -> Iterator[SongClips]:
        with clock.stage("read"):
            table, footer = self._read_shard(task)
        entries = {entry.song_id: entry for entry in footer.ledger}
        for planned in songs:
            entry = entries[planned.song_id]
            if planned.song_id in crashed:
                fault = BadInput(Reason.CRASHED, CRASHED)
                entry = quarantined_entry(planned, fault, entry.sha256)
                clips = table.slice(0, 0)
            else:
                clips = table.filter(pc.equal(table["song_id"], planned.song_id))
            with clock.stage("quality"):
                clips = self._with_missing_measures(clips)
            yield SongClips(planned, clips, entry, origin_of(footer))

    def _read_shard(self, task: Task) -> tuple[pa.Table, Footer]:
        path = self.taken_over.dataset / "data" / task.shard_name
        try:
            footer = read_footer(path)
            if (footer.task_id, footer.fingerprint) != (task.task_id, self.taken_over.fingerprint):
                raise UserError(f"{path} was replaced while it was read; run this command again")
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read(self.taken_over.columns, use_threads=False)
            require_columns(table, self.taken_over.columns)
            faults = itertools.chain(identity_faults(table, footer), audio_faults(table, footer))
            if (fault := next(faults, None)) is not None:
                raise damaged_source(path, fault)
        except FileNotFoundError as error:
            raise UserError(f"{path} disappeared during the run; run this command again") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged_source(path, error) from error
        return table.replace_schema_metadata(None), footer

    def _with_missing_measures(self, clips: pa.Table) -> pa.Table:
        """Measure the stored audio, where the shard's schema version lacks measures."""
        names = self.taken_over.missing_measures
        if not names:
            return clips
        wavs = DecodedClips(clips["audio"], self.audio.subtype)
        measured = [measure_quality(wav, self.audio.sample_rate, names) for wav in wavs]
        for name in names:
            column = pa.array([values[name] for values in measured], pa.float32())
            clips = clips.append_column(name, column)
        return clips

    def close(self) -> None:
        """Do nothing: no file stays open."""


def origin_of(footer: Footer) -> Origin:
    """Return the origin that shards made from this one carry."""
    return Origin(footer.fingerprint, footer.environment)


def damaged_source(path: Path, fault: object) -> UserError:
    """Return the error for a shard of the other dataset that cannot be read or is wrong."""
    return UserError(
        f"{path} cannot be used ({one_line(fault)}). `cantor verify {path.parent.parent}` lists "
        "everything that is damaged. To rebuild a shard, delete it and run `cantor extract` again."
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
            **clip.quality,
        }
        for name, value in row.items():
            columns[name].append(value)
    return pa.table(columns, schema=AUDIO_SCHEMA)
