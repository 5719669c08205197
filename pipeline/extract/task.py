"""One task, straight through: from its songs to its shard.

    songs, or a shard of another dataset -> clips -> f0 -> units -> x-vectors -> shard

`ClipMaker` does what needs no GPU, `ShardMaker` runs the networks and commits the shard. On a
cluster without GPUs one operator calls both. With GPUs each has an operator of its own, and the
clips travel between them as one Arrow IPC buffer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa

from pipeline.cluster.environment import (
    environment,
    environment_of_networks,
    limit_threads,
    threads_of,
)
from pipeline.cluster.task_rows import COMMITTED, guarded, read_result, read_row, result_row
from pipeline.cluster.workload import Heartbeat
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import EncoderIdentity, XvectorIdentity
from pipeline.dataset.shards import Footer, Origin, write_shard
from pipeline.extract.clip_sources import open_clip_source
from pipeline.extract.job import ExtractJob
from pipeline.extract.pitch_columns import Pitch, load_pitch
from pipeline.extract.unit_columns import UnitColumns, XvectorColumn
from pipeline.songs.plan import load_plan
from stages.chain import StageClock


@dataclass(frozen=True)
class TaskClips:
    """Clips of a task, one row each, the ledger of its songs, and where `--from` took them."""

    table: pa.Table
    ledger: list[SongEntry]
    origin: Origin | None = None

    def to_buffer(self) -> bytes:
        """Return the clips as an Arrow IPC stream, with the rest in its metadata."""
        notes = {
            "ledger": json.dumps([asdict(entry) for entry in self.ledger]),
            "origin": json.dumps(self.origin and asdict(self.origin)),
        }
        table = self.table.replace_schema_metadata(notes)
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write_table(table)
        return bytes(buffer.getvalue())

    @staticmethod
    def from_buffer(buffer: pa.Buffer) -> TaskClips:
        """Read what `to_buffer` wrote."""
        table = pa.ipc.open_stream(buffer).read_all()
        notes = {key: json.loads(text) for key, text in table.schema.metadata.items()}
        ledger = [SongEntry.from_dict(entry) for entry in notes[b"ledger"]]
        origin = notes[b"origin"] and Origin(**notes[b"origin"])
        return TaskClips(table.replace_schema_metadata(None), ledger, origin)


class ClipMaker:
    """Makes the clips of a task, with their pitch unless a network estimates it."""

    def __init__(self, job: ExtractJob, heartbeat: Heartbeat) -> None:
        limit_threads(job)
        self.heartbeat = heartbeat
        self.tasks = load_plan(job.folder)
        self.source = open_clip_source(job)
        self.pitch = Pitch(job) if job.makes_f0 and not job.f0_networks else None

    def make(
        self, index: int, crashed: Collection[str], clock: StageClock, only: str | None = None
    ) -> TaskClips:
        """Return the clips of a task, song by song.

        crashed: songs on which a worker process died; they are quarantined unread.
        only: the one song to read, to find out whether it kills its worker.
        """
        task = self.tasks[index]
        songs = [song for song in task.songs if only in (None, song.song_id)]
        tables, ledger, origin = [], [], None
        for song in self.source.read(task, songs, crashed, clock):
            clips, entries, origin = song.clips, [song.entry], song.origin
            if self.pitch is not None:
                clips, entries = self.pitch.add(clips, entries, clock)
            tables.append(clips)
            ledger += entries
            self.heartbeat(song.planned.song_id, song.planned.duration_s, entries[0].status)
        return TaskClips(pa.concat_tables(tables), ledger, origin)

    def close(self) -> None:
        self.source.close()


class ShardMaker:
    """Adds what networks make of a task's clips (pitch, units, x-vectors) and commits the shard."""

    def __init__(self, job: ExtractJob) -> None:
        """Load the networks. Raises: UserError: when one changed since the run began, or fails."""
        limit_threads(job)
        self.job = job
        self.tasks = load_plan(job.folder)
        self.pitch = load_pitch(job) if job.f0_networks else None
        self.units = [
            UnitColumns(section, cfg, job.weights)
            for section, cfg in job.config.all_encoders.items()
            if cfg.name not in job.units_taken_over
        ]
        self.xvector = XvectorColumn(job.config.xvector, job.weights) if job.makes_xvector else None

    def make(self, index: int, clips: TaskClips, clock: StageClock) -> None:
        """Complete the clips of a task and commit its shard."""
        clips = self.complete(clips, clock)
        with clock.stage("write"):
            shard_name = self.tasks[index].shard_name
            write_shard(self.job.folder, shard_name, clips.table, self._footer(index, clips))

    def complete(self, clips: TaskClips, clock: StageClock) -> TaskClips:
        """Return `clips` with every column, without those that their pitch filters out."""
        config = self.job.config
        table, ledger = clips.table, clips.ledger
        if self.pitch is not None:
            table, ledger = self.pitch.add(table, ledger, clock)
        for units in self.units:
            table = units.add(table, config, clock)
        if self.xvector is not None:
            table = self.xvector.add(table, config, clock)
        return TaskClips(table, ledger, clips.origin)

    def _footer(self, index: int, clips: TaskClips) -> Footer:
        job, config = self.job, self.job.config
        return Footer(
            schema_version=job.schema_version,
            fingerprint=job.fingerprint,
            task=index,
            task_id=self.tasks[index].task_id,
            sample_rate=config.audio.sample_rate,
            hop_length=config.f0.hop_length,
            subtype=config.audio.subtype,
            f0_method=config.f0.method,
            encoders=self._encoders(),
            environment=environment(threads_of(job)) | self._numerics(),
            ledger=clips.ledger,
            xvector=self._xvector_identity(),
            origin=clips.origin,
        )

    def _encoders(self) -> list[EncoderIdentity]:
        """Return the identity of every column of units, in the order of the settings."""
        made = {units.identity.name: units.identity for units in self.units}
        known: Mapping[str, EncoderIdentity] = {**self.job.units_taken_over, **made}
        return [known[cfg.name] for cfg in self.job.config.all_encoders.values()]

    def _xvector_identity(self) -> XvectorIdentity | None:
        if self.xvector is not None:
            return self.xvector.identity
        return self.job.taken_over.xvector if self.job.taken_over else None

    def _numerics(self) -> dict[str, str]:
        """Return the packages that had weights, and every dtype other than float32."""
        onnx = any(units.cfg.name.endswith("-onnx") for units in self.units)
        numerics = environment_of_networks(self.job.f0_networks, onnx)
        others = [f"{u.cfg.name} {u.cfg.dtype}" for u in self.units if u.cfg.dtype != "float32"]
        if others:
            numerics["dtype"] = ", ".join(others)
        return numerics


class PrepareTask:
    """The operator on CPUs, where another one on GPUs finishes the task."""

    def __init__(self, job: ExtractJob, heartbeat: Heartbeat) -> None:
        self.job = job
        self.heartbeat = heartbeat

    @functools.cached_property
    def clip_maker(self) -> ClipMaker:
        return ClipMaker(self.job, self.heartbeat)

    def __call__(self, row: pa.Table) -> pa.Table:
        task, crashed = read_row(row)
        return guarded(task, lambda clock: self.run(task, crashed, clock))

    def run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        """Return the clips for the operator on GPUs."""
        return self.clip_maker.make(task, crashed, clock).to_buffer()

    def close(self) -> None:
        if "clip_maker" in self.__dict__:  # made at the first task
            self.clip_maker.close()


class ExtractTask(PrepareTask):
    """The operator of a whole task, the only one on a cluster without GPUs."""

    @functools.cached_property
    def shard_maker(self) -> ShardMaker:
        return ShardMaker(self.job)

    def run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        """Commit the shard of a task."""
        shard_maker = self.shard_maker  # loads networks first: without them no song is read
        shard_maker.make(task, self.clip_maker.make(task, crashed, clock), clock)
        return None


class FinishTask:
    """The operator on GPUs: completes the clips that `PrepareTask` sent, and commits the shard."""

    def __init__(self, job: ExtractJob) -> None:
        self.job = job

    @functools.cached_property
    def shard_maker(self) -> ShardMaker:
        return ShardMaker(self.job)

    def __call__(self, row: pa.Table) -> pa.Table:
        before = read_result(row)
        if before.status != COMMITTED:
            return result_row(before)

        def run(clock: StageClock) -> None:
            clock.seconds.update(before.stage_s)
            clips = TaskClips.from_buffer(row["clips"][0].as_buffer())
            self.shard_maker.make(before.task, clips, clock)

        return guarded(before.task, run)


def probe_song(job: ExtractJob, task: int, song_id: str) -> None:
    """Run one song through the whole task without a shard, to see whether it kills the process."""
    clip_maker, clock = ClipMaker(job, lambda *_: None), StageClock()
    try:
        clips = clip_maker.make(task, (), clock, only=song_id)
        ShardMaker(job).complete(clips, clock)
    finally:
        clip_maker.close()


def load_task_models(job: ExtractJob) -> None:
    """Load every model that a worker loads, to see whether that kills the process."""
    ShardMaker(job)
