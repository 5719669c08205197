"""What runs in a worker: the CPU half of a task, the units half, and both composed.

The classes take and give one-row Arrow tables, as Ray Data hands them out, and are called in the
driver's own process for `--local` and in tests.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from models.encoders import load_encoder
from pipeline.config import SCHEMA_VERSION, ExtractConfig
from pipeline.errors import SongBug
from pipeline.ledger import SongEntry, settle
from pipeline.plan import PlannedSong, Task, load_plan
from pipeline.shards import (
    CLIP_SCHEMA,
    QUALITY_COLUMNS,
    EncoderIdentity,
    Footer,
    is_disk_full,
    storage_fault,
    write_shard,
)
from stages.chain import PreparedSong, StageClock, prepare_song
from stages.decode import Decoder
from stages.errors import BadInput, Reason
from stages.flac import decode_flac
from stages.pcm import Subtype, dequantise
from stages.types import Array
from stages.units import encode_units, pack_units

COMMITTED, BUG, STORAGE = "committed", "bug", "storage"

# Called with (song_id, seconds of source audio, status) after every song.
Heartbeat = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told. Tasks are named by their index in the plan."""

    dataset: Path
    corpus: Path
    config: ExtractConfig
    fingerprint: str
    encoder_sha256: tuple[str | None, ...]  # of the checkpoints, in the order of config.encoders
    gone: frozenset[str]  # songs of the plan that the corpus no longer had when the run began


@dataclass(frozen=True)
class TaskResult:
    """What a worker reports of a task; `detail` says why it was not committed."""

    task: int
    status: str
    detail: str = ""
    disk_full: bool = False
    stage_s: dict[str, float] = field(default_factory=dict)


class Scratch:
    """A folder for decoded PCM. Those of dead processes are swept when a new one is made."""

    def __init__(self, parent: str | None) -> None:
        root = Path(parent or tempfile.gettempdir()) / f"cantor-scratch-{os.getuid()}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (root / ".lock").open("ab") as door:  # one at a time: a new folder is not locked yet
            fcntl.flock(door, fcntl.LOCK_EX)
            for old in root.iterdir():
                if old.is_dir() and not _is_held(old):
                    shutil.rmtree(old, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(dir=root))
            self._held = (self.folder / ".lock").open("ab")
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()


def _is_held(folder: Path) -> bool:
    """A living process owns this scratch folder."""
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class CpuHalf:
    """decode, resample, slice, loudness, quantise, f0 and quality of a task's songs."""

    def __init__(self, job: Job, heartbeat: Heartbeat) -> None:
        _limit_threads(job.config)
        self.job = job
        self.heartbeat = heartbeat
        self.tasks = load_plan(job.dataset)
        self.scratch = Scratch(job.config.workers.scratch)
        self.decoder = Decoder(job.config.decode, self.scratch.folder)

    def prepare(
        self, index: int, crashed: Sequence[str], clock: StageClock, only: str | None = None
    ) -> tuple[pa.Table, list[SongEntry]]:
        """Clips (columns of CLIP_SCHEMA) and ledger of a task.

        crashed: songs on which a worker process died; they are quarantined unread.
        only: the one song of the task to look at, for finding out which one kills its worker.
        """
        ledger, tables = [], []
        for planned in self.tasks[index].songs:
            if only not in (None, planned.song_id):
                continue
            prepare = self._refuse if planned.song_id in crashed else self._prepare
            song, entry = self._settle(planned, functools.partial(prepare, clock=clock))
            ledger.append(entry)
            if song is not None:
                with clock.stage("write"):
                    tables.append(_clip_table(planned, song, self.job.config))
            self.heartbeat(planned.song_id, planned.duration_s, entry.status)
        return pa.concat_tables(tables or [CLIP_SCHEMA.empty_table()]), ledger

    def _settle(
        self, planned: PlannedSong, prepare: Callable[[bytes], PreparedSong]
    ) -> tuple[PreparedSong | None, SongEntry]:
        path = os.path.join(os.fsencode(self.job.corpus), planned.path)
        try:
            song, entry = settle(planned, path, prepare)
            was_there = planned.mtime_ns > 0 and planned.song_id not in self.job.gone
            if entry.reason == Reason.MISSING and was_there:
                _require_mounted(os.path.dirname(path))
            return song, entry
        except Exception as error:
            error.add_note(f"while working on {planned.song_id}")
            raise

    def _prepare(self, path: bytes, clock: StageClock) -> PreparedSong:
        return prepare_song(path, self.decoder, self.job.config, clock)

    def _refuse(self, path: bytes, clock: StageClock) -> PreparedSong:
        raise BadInput(Reason.CRASHED, "a worker process died on this song each time it was tried")

    def close(self) -> None:
        self.decoder.close()
        self.scratch.close()


class UnitsHalf:
    """Units of a task's clips by every encoder, then the commit of its shard."""

    def __init__(self, job: Job) -> None:
        _limit_threads(job.config)
        self.job = job
        self.tasks = load_plan(job.dataset)
        self.encoders = []
        self.identities = []
        for cfg, sha256 in zip(job.config.encoders, job.encoder_sha256, strict=True):
            encoder = load_encoder(cfg.name, cfg.checkpoint, _device(cfg.device))
            self.encoders.append((cfg, encoder))
            rate = encoder.sample_rate / encoder.hop_length
            self.identities.append(EncoderIdentity(cfg.name, encoder.dim, "float16", rate, sha256))

    def finish(
        self, index: int, clips: pa.Table, ledger: list[SongEntry], clock: StageClock
    ) -> None:
        """Add the units columns and commit the shard."""
        clips = self.encode(clips, clock)
        with clock.stage("write"):
            task = self.tasks[index]
            write_shard(self.job.dataset, task.shard_name, clips, self._footer(task, ledger))

    def encode(self, clips: pa.Table, clock: StageClock) -> pa.Table:
        """`clips` with the columns of every encoder."""
        config = self.job.config
        wavs = _DecodedClips(clips["audio"], config.audio.subtype)
        songs = clips["song_id"].to_pylist()
        for (cfg, encoder), identity in zip(self.encoders, self.identities, strict=True):
            with clock.stage("units"):
                units = encode_units(
                    wavs, songs, config.audio.sample_rate, encoder, cfg, config.resample
                )
            packed = []
            for clip_id, frames in zip(clips["clip_id"].to_pylist(), units, strict=True):
                try:
                    packed.append(pack_units(frames))
                except OverflowError as error:
                    raise SongBug(f"{clip_id}: {error}") from error
            frames_count = pa.array([len(frames) for frames in units], pa.int32())
            clips = clips.append_column(identity.column, pa.array(packed, pa.binary()))
            clips = clips.append_column(identity.frames_column, frames_count)
        return clips

    def _footer(self, task: Task, ledger: list[SongEntry]) -> Footer:
        config = self.job.config
        return Footer(
            schema_version=SCHEMA_VERSION,
            fingerprint=self.job.fingerprint,
            task=task.index,
            task_id=task.task_id,
            sample_rate=config.audio.sample_rate,
            hop_length=config.f0.hop_length,
            subtype=config.audio.subtype,
            f0_method=config.f0.method,
            encoders=self.identities,
            environment=environment(threads_of(config)),
            ledger=ledger,
        )


class PrepareTask:
    """The CPU operator before a GPU operator: the clips travel as one Arrow IPC buffer."""

    def __init__(self, job: Job, heartbeat: Heartbeat) -> None:
        self.job = job
        self.heartbeat = heartbeat

    @functools.cached_property
    def cpu(self) -> CpuHalf:
        return CpuHalf(self.job, self.heartbeat)

    def __call__(self, row: pa.Table) -> pa.Table:
        task, crashed = _unpack_row(row)
        return _guarded(task, lambda clock: self._run(task, crashed, clock))

    def _run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        clips, ledger = self.cpu.prepare(task, crashed, clock)
        entries = json.dumps([asdict(entry) for entry in ledger])
        clips = clips.replace_schema_metadata({"ledger": entries})
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, clips.schema) as stream:
            stream.write_table(clips)
        return bytes(buffer.getvalue())

    def close(self) -> None:
        if "cpu" in self.__dict__:  # made at the first task
            self.cpu.close()


class ExtractTask(PrepareTask):
    """A whole task, row in and row out: the one operator of a cluster without GPUs."""

    @functools.cached_property
    def units(self) -> UnitsHalf:
        return UnitsHalf(self.job)

    def _run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        self.units.finish(task, *self.cpu.prepare(task, crashed, clock), clock)
        return None


class FinishTask:
    """The GPU operator: units of what `PrepareTask` sent, and the commit."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @functools.cached_property
    def units(self) -> UnitsHalf:
        return UnitsHalf(self.job)

    def __call__(self, row: pa.Table) -> pa.Table:
        before = read_result(row)
        if before.status != COMMITTED:
            return result_row(before)

        def run(clock: StageClock) -> None:
            clock.seconds.update(before.stage_s)
            clips = pa.ipc.open_stream(row["clips"][0].as_buffer()).read_all()
            entries = json.loads(clips.schema.metadata[b"ledger"])
            ledger = [SongEntry.from_dict(entry) for entry in entries]
            self.units.finish(before.task, clips, ledger, clock)

        return _guarded(before.task, run)


def probe_song(job: Job, task: int, song_id: str) -> None:
    """One song through both halves, nothing written: does it kill the process?"""
    cpu, clock = CpuHalf(job, lambda *_: None), StageClock()
    try:
        clips, _ = cpu.prepare(task, (), clock, only=song_id)
        UnitsHalf(job).encode(clips, clock)
    finally:
        cpu.close()


def task_row(task: int, crashed: Collection[str] = ()) -> dict[str, Any]:
    """The row that stands for a task at the start of the graph."""
    return {"task": task, "crashed": json.dumps(sorted(crashed))}


def _unpack_row(row: pa.Table) -> tuple[int, list[str]]:
    return row["task"][0].as_py(), json.loads(row["crashed"][0].as_py())


def result_row(result: TaskResult, clips: bytes | None = None) -> pa.Table:
    data = pa.array([clips], pa.large_binary())
    return pa.table({"result": [json.dumps(asdict(result))], "clips": data})


def read_result(row: pa.Table) -> TaskResult:
    return TaskResult(**json.loads(row["result"][0].as_py()))


def _guarded(task: int, run: Callable[[StageClock], bytes | None]) -> pa.Table:
    """The row a task gives. Its faults become a row too: the driver decides, Ray does not retry.

    run: gives the clips that the next operator is to finish, or None when the task is committed.
    """
    clock = StageClock()
    try:
        clips = run(clock)
        return result_row(TaskResult(task, COMMITTED, stage_s=dict(clock.seconds)), clips)
    except OSError as error:
        words = f"{storage_fault(error)}{_notes(error)}"
        return result_row(TaskResult(task, STORAGE, words, is_disk_full(error)))
    except Exception as error:  # noqa: BLE001  the driver names the song and stops the run
        words = "".join(traceback.format_exception(error))
        return result_row(TaskResult(task, BUG, words))


def _notes(error: BaseException) -> str:
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


def _require_mounted(folder: bytes) -> None:
    """A song went missing during the run. Is it that song, or the mount that it lay on?"""
    if not os.path.isdir(folder) or not any(os.scandir(folder)):
        words = "the folder is gone or empty since this run began (is it still mounted?)"
        raise FileNotFoundError(errno.ENOENT, words, os.fsdecode(folder))


def _clip_table(planned: PlannedSong, song: PreparedSong, config: ExtractConfig) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in CLIP_SCHEMA.names}
    for number, clip in enumerate(song.clips):
        clip_id = f"{planned.song_id}#{number:06d}"
        row = {
            "clip_id": clip_id,
            "song_id": planned.song_id,
            "speaker": planned.speaker,
            "clip_index": number,
            "clip_count": len(song.clips),
            "start": clip.span.start,
            "stop": clip.span.stop,
            "audio": {"bytes": clip.flac, "path": f"{clip_id}.flac"},
            "sample_rate": config.audio.sample_rate,
            "num_samples": clip.span.stop - clip.span.start,
            "f0": clip.f0,
            "loudness_lufs": clip.reading.loudness_lufs,
            "gain_db": clip.reading.gain_db,
            "peak_db": clip.reading.peak_db,
            **{name: getattr(clip.quality, name) for name in QUALITY_COLUMNS},
        }
        for name, value in row.items():
            columns[name].append(value)
    return pa.table(columns, schema=CLIP_SCHEMA)


class _DecodedClips(Sequence[Array]):
    """Clips of a column of FLAC, decoded one at a time as they are read."""

    def __init__(self, audio: pa.ChunkedArray, subtype: Subtype) -> None:
        self.flac = pc.struct_field(audio, "bytes")
        self.subtype = subtype

    def __len__(self) -> int:
        return len(self.flac)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return dequantise(decode_flac(self.flac[index].as_py(), self.subtype), self.subtype)


def threads_of(config: ExtractConfig) -> int:
    """Threads of a worker: as many as it has CPUs, so that N workers do not fight."""
    return max(1, int(config.workers.cpus_per_worker))


def _limit_threads(config: ExtractConfig) -> None:
    import torch

    torch.set_num_threads(threads_of(config))


def _device(choice: str) -> str:
    if choice != "auto":
        return choice
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def environment(threads: int) -> dict[str, str]:
    """What may change last bits of the output without changing its meaning."""
    libraries = ("numpy", "scipy", "torch", "librosa", "soxr", "soundfile", "pyloudnorm")
    estimators = ("praat-parselmouth", "pyworld", "pyarrow")
    versions = {name: importlib.metadata.version(name) for name in (*libraries, *estimators)}
    import torch

    return versions | {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "threads": str(threads),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
