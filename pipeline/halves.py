"""The two halves of a task: its clips, then their units and the commit of its shard.

The clips come from songs, or from the shard of another dataset.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.encoders import load_encoder
from pipeline.config import SCHEMA_VERSION, ExtractConfig, load_codebook_of, naming
from pipeline.errors import SongBug, UserError
from pipeline.ledger import SongEntry, quarantine, settle
from pipeline.plan import PlannedSong, Task, load_plan
from pipeline.shards import (
    CLIP_SCHEMA,
    QUALITY_COLUMNS,
    XVECTOR_COLUMN,
    EncoderIdentity,
    Footer,
    Origin,
    XvectorIdentity,
    read_footer,
    write_shard,
)
from pipeline.weights import Weights, require_unchanged
from stages.chain import PreparedSong, StageClock, prepare_song
from stages.decode import Decoder
from stages.errors import BadInput, Reason
from stages.f0 import estimate_f0
from stages.flac import decode_flac
from stages.pcm import Subtype, dequantise
from stages.quality import voiced_ratio
from stages.types import Array
from stages.units import EncoderConfig, encode_units, pack_ids, pack_units
from stages.xvector import embed_clips

_CRASHED = "a worker process died on this song each time it was tried"

# Called with (song_id, seconds of source audio, status) after every song.
Heartbeat = Callable[[str, float, str], None]


@dataclass(frozen=True)
class TakenOver:
    """What comes from the shards of another dataset instead of being made: the audio, and these."""

    dataset: Path
    fingerprint: str
    f0: bool
    units: tuple[EncoderIdentity, ...]
    xvector: XvectorIdentity | None

    @property
    def columns(self) -> list[str]:
        units = [name for each in self.units for name in (each.column, each.frames_column)]
        return [*CLIP_SCHEMA.names, *units, *([XVECTOR_COLUMN] if self.xvector else [])]


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told. Tasks are named by their index in the plan."""

    dataset: Path
    corpus: Path  # where the songs are; the other dataset, where one is taken over
    config: ExtractConfig
    fingerprint: str
    weights: Mapping[str, Weights]  # of what has to be loaded, by the key that names it
    gone: frozenset[str] = frozenset()  # songs of the plan that were not there when the run began
    threads: int | None = None  # of a worker; None until it is known what fits
    taken_over: TakenOver | None = None


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
        _limit_threads(job)
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
        raise BadInput(Reason.CRASHED, _CRASHED)

    def close(self) -> None:
        self.decoder.close()
        self.scratch.close()


class ShardHalf:
    """Clips of a task as the shard of another dataset has them, in place of its songs.

    They keep their samples, and f0 unless other settings are given for it.
    """

    def __init__(self, job: Job, taken_over: TakenOver, heartbeat: Heartbeat) -> None:
        _limit_threads(job)
        self.job = job
        self.taken_over = taken_over
        self.heartbeat = heartbeat
        self.tasks = load_plan(job.dataset)

    def prepare(
        self, index: int, crashed: Sequence[str], clock: StageClock, only: str | None = None
    ) -> tuple[pa.Table, list[SongEntry]]:
        """As `CpuHalf.prepare`; the table has the columns of units that are taken over too."""
        task = self.tasks[index]
        with clock.stage("read"):
            clips, footer = self._read(task)
        wanted = [song for song in task.songs if only in (None, song.song_id)]
        entries = {entry.song_id: entry for entry in footer.ledger}
        for song in wanted:
            if song.song_id in crashed:
                fault = BadInput(Reason.CRASHED, _CRASHED)
                entries[song.song_id] = quarantine(song, fault, entries[song.song_id].sha256)
        ledger = [entries[song.song_id] for song in wanted]
        kept = [song.song_id for song in wanted if song.song_id not in crashed]
        clips = clips.filter(pc.is_in(clips["song_id"], pa.array(kept, pa.string())))
        if not self.taken_over.f0:
            clips = self._estimate_f0(clips, clock)
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

    def _estimate_f0(self, clips: pa.Table, clock: StageClock) -> pa.Table:
        config = self.job.config
        contours = []
        wavs = _DecodedClips(clips["audio"], config.audio.subtype)
        for song_id, wav in zip(clips["song_id"].to_pylist(), wavs, strict=True):
            try:
                with clock.stage("f0"):
                    contours.append(estimate_f0(wav, config.audio.sample_rate, config.f0))
            except Exception as error:
                error.add_note(f"while working on {song_id}")
                raise
        voiced = [voiced_ratio(f0) for f0 in contours]
        for name, values in (("f0", contours), ("voiced_ratio", voiced)):
            column = clips.schema.get_field_index(name)
            kind = CLIP_SCHEMA.field(name)
            clips = clips.set_column(column, kind, pa.array(values, kind.type))
        return clips

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


class UnitsOf:
    """An encoder, loaded, and what it fills columns with."""

    def __init__(self, section: str, cfg: EncoderConfig, weights: Mapping[str, Weights]) -> None:
        """Raises: UserError when its weights are not what the run began with, or do not load."""
        self.cfg = cfg
        sha256 = _sha256_unchanged(f"{section}.checkpoint", weights)
        codebook_sha256 = _sha256_unchanged(f"{section}.codebook", weights)
        self.codebook = load_codebook_of(section, cfg, sha256)
        with _loading(section):
            self.encoder = load_encoder(
                cfg.name, cfg.checkpoint, _device(cfg.device), **cfg.options()
            )
        rate = self.encoder.sample_rate / self.encoder.hop_length
        if self.codebook is None:
            dim = self.encoder.dim
            self.identity = EncoderIdentity(cfg.name, dim, "float16", rate, sha256)
        else:
            size = len(self.codebook.centroids)
            self.identity = EncoderIdentity(
                cfg.name, 1, "int16", rate, sha256, codebook_sha256, size
            )

    def add_columns(self, clips: pa.Table, config: ExtractConfig, clock: StageClock) -> pa.Table:
        wavs = _DecodedClips(clips["audio"], config.audio.subtype)
        songs = clips["song_id"].to_pylist()
        rate = config.audio.sample_rate
        with clock.stage("units"):
            units = encode_units(wavs, songs, rate, self.encoder, self.cfg, config.resample)
            packed = []
            for clip_id, frames in zip(clips["clip_id"].to_pylist(), units, strict=True):
                try:
                    packed.append(self._pack(frames))
                except OverflowError as error:
                    raise SongBug(f"{clip_id}: {error}") from error
        counts = pa.array([len(frames) for frames in units], pa.int32())
        clips = clips.append_column(self.identity.column, pa.array(packed, pa.binary()))
        return clips.append_column(self.identity.frames_column, counts)

    def _pack(self, frames: Array) -> bytes:
        if self.codebook is None:
            return pack_units(frames)
        import torch

        return pack_ids(self.codebook.assign(torch.from_numpy(frames)).numpy())


class UnitsHalf:
    """Units of a task's clips by every encoder, their x-vectors, then the commit of the shard."""

    def __init__(self, job: Job) -> None:
        _limit_threads(job)
        self.job = job
        self.tasks = load_plan(job.dataset)
        over = job.taken_over
        taken = {identity.name: identity for identity in over.units} if over else {}
        self.encoders = []
        self.identities = []
        for section, cfg in job.config.all_encoders.items():
            if cfg.name in taken:
                self.identities.append(taken[cfg.name])
            else:
                self.encoders.append(UnitsOf(section, cfg, job.weights))
                self.identities.append(self.encoders[-1].identity)
        self.xvector = over.xvector if over else None
        self.embedder = None
        if job.config.xvector.checkpoint is not None and self.xvector is None:
            from models.encoders.xvector import load_xvector

            sha256 = _sha256_unchanged("xvector.checkpoint", job.weights)
            assert sha256 is not None
            with _loading("xvector"):
                cfg_xvector = job.config.xvector
                self.embedder = load_xvector(
                    job.config.xvector.checkpoint, _device(cfg_xvector.device)
                )
            self.xvector = XvectorIdentity(self.embedder.dim, sha256)

    def finish(
        self, index: int, clips: pa.Table, ledger: list[SongEntry], clock: StageClock
    ) -> None:
        """Add the columns of units and x-vectors, and commit the shard."""
        origin = (clips.schema.metadata or {}).get(b"origin")
        clips = self.encode(clips, clock)
        with clock.stage("write"):
            task = self.tasks[index]
            footer = self._footer(task, ledger, Origin(**json.loads(origin)) if origin else None)
            write_shard(self.job.dataset, task.shard_name, clips, footer)

    def encode(self, clips: pa.Table, clock: StageClock) -> pa.Table:
        """`clips` with the columns of every encoder, and the x-vectors."""
        config = self.job.config
        for encoder in self.encoders:
            clips = encoder.add_columns(clips, config, clock)
        if self.embedder is not None:
            wavs = _DecodedClips(clips["audio"], config.audio.subtype)
            with clock.stage("xvector"):
                vectors = embed_clips(
                    wavs, config.audio.sample_rate, self.embedder, config.resample
                )
            clips = clips.append_column(XVECTOR_COLUMN, pa.array(vectors, pa.list_(pa.float32())))
        return clips

    def _footer(self, task: Task, ledger: list[SongEntry], origin: Origin | None) -> Footer:
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
            environment=environment(threads_of(self.job)) | self._numerics(),
            ledger=ledger,
            xvector=self.xvector,
            origin=origin,
        )

    def _numerics(self) -> dict[str, str]:
        """Of the encoders, for the footer's environment: what is not float32 and torch."""
        numerics = {}
        others = [f"{each.cfg.name} {each.cfg.dtype}" for each in self.encoders]
        others = [words for words in others if not words.endswith(" float32")]
        if others:
            numerics["dtype"] = ", ".join(others)
        if any(each.cfg.name.endswith("-onnx") for each in self.encoders):
            import onnxruntime

            numerics["onnxruntime"] = onnxruntime.__version__
        return numerics


def _sha256_unchanged(key: str, weights: Mapping[str, Weights]) -> str | None:
    if key not in weights:
        return None
    require_unchanged(key, weights[key])
    return weights[key].sha256


@contextmanager
def _loading(section: str) -> Iterator[None]:
    """What the user can put right about a model that does not load, in words that name it."""
    import torch

    try:
        with naming(section):
            yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"{section}: there is too little memory to load it ({error}); lower "
            "workers.max_workers, or raise workers.gpus_per_worker where it is a GPU's"
        ) from error


def open_first_half(job: Job, heartbeat: Heartbeat) -> CpuHalf | ShardHalf:
    """Where the clips of a task come from."""
    if job.taken_over is None:
        return CpuHalf(job, heartbeat)
    return ShardHalf(job, job.taken_over, heartbeat)


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


def threads_of(job: Job) -> int:
    """Threads of a worker: as many as it has CPUs, so that N workers do not fight."""
    return job.threads or max(1, int(job.config.workers.cpus_per_worker or 1))


def _limit_threads(job: Job) -> None:
    import torch

    torch.set_num_threads(threads_of(job))


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
