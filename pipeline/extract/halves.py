"""The two halves of a task: its clips, then what networks make of them and the shard's commit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa

from models.encoders import load_encoder
from pipeline.cluster.environment import (
    environment,
    environment_of_networks,
    limit_threads,
    threads_of,
)
from pipeline.cluster.workload import Heartbeat
from pipeline.dataset.decoded_clips import DecodedClips
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import SCHEMA_VERSION, XVECTOR_COLUMN, EncoderIdentity, XvectorIdentity
from pipeline.dataset.shards import Footer, Origin, write_shard
from pipeline.errors import SongBug, UserError
from pipeline.extract.clip_sources import ClipsOfShard, ClipsOfSongs
from pipeline.extract.config import ExtractConfig
from pipeline.extract.job import ExtractJob
from pipeline.extract.model_checks import load_codebook_of, name_setting_in_errors
from pipeline.extract.pitch_columns import Pitch
from pipeline.songs.plan import Task, load_plan
from pipeline.storage.weight_files import WeightFile, require_unchanged
from stages.chain import StageClock
from stages.device import resolve_device
from stages.f0 import load_networks
from stages.types import Array
from stages.units import EncoderConfig, encode_units, pack_ids, pack_units
from stages.xvector import embed_clips


class CpuHalf:
    """What needs no GPU: the clips of a task, and their pitch unless a network finds it."""

    def __init__(self, job: ExtractJob, heartbeat: Heartbeat) -> None:
        limit_threads(job)
        pitch = Pitch(job) if job.makes_f0 and not job.f0_networks else None
        self.clips = (
            ClipsOfSongs(job, heartbeat, pitch)
            if job.taken_over is None
            else ClipsOfShard(job, job.taken_over, heartbeat, pitch)
        )

    def prepare(
        self, index: int, crashed: Sequence[str], clock: StageClock, only: str | None = None
    ) -> tuple[pa.Table, list[SongEntry]]:
        """Clips and ledger of a task; the table has the columns of units that are taken over too.

        crashed: songs on which a worker process died; they are quarantined unread.
        only: the one song of the task to look at, for finding out which one kills its worker.
        """
        return self.clips.prepare(index, crashed, clock, only)

    def close(self) -> None:
        self.clips.close()


class UnitsOf:
    """An encoder, loaded, and what it fills columns with."""

    def __init__(self, section: str, cfg: EncoderConfig, weights: Mapping[str, WeightFile]) -> None:
        """Raises: UserError when its weights are not what the run began with, or do not load."""
        self.cfg = cfg
        sha256 = _sha256_unchanged(f"{section}.checkpoint", weights)
        codebook_sha256 = _sha256_unchanged(f"{section}.codebook", weights)
        self.codebook = load_codebook_of(section, cfg, sha256)
        with _loading(section):
            self.encoder = load_encoder(
                cfg.name, cfg.checkpoint, resolve_device(cfg.device), **cfg.options()
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
        wavs = DecodedClips(clips["audio"], config.audio.subtype)
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
    """What networks make of a task's clips (pitch, units, x-vectors), then its shard's commit."""

    def __init__(self, job: ExtractJob) -> None:
        limit_threads(job)
        self.job = job
        self.tasks = load_plan(job.folder)
        self.pitch = None
        if job.f0_networks:
            if "f0.checkpoint" in job.weights:
                require_unchanged("f0.checkpoint", job.weights["f0.checkpoint"])
            with _loading("f0"):
                load_networks(job.config.f0)
            self.pitch = Pitch(job)
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
                    job.config.xvector.checkpoint, resolve_device(cfg_xvector.device)
                )
            self.xvector = XvectorIdentity(self.embedder.dim, sha256)

    def finish(
        self, index: int, clips: pa.Table, ledger: list[SongEntry], clock: StageClock
    ) -> None:
        """Add the columns of units and x-vectors, and commit the shard."""
        origin = (clips.schema.metadata or {}).get(b"origin")
        clips, ledger = self.complete(clips, ledger, clock)
        with clock.stage("write"):
            task = self.tasks[index]
            footer = self._footer(task, ledger, Origin(**json.loads(origin)) if origin else None)
            write_shard(self.job.folder, task.shard_name, clips, footer)

    def complete(
        self, clips: pa.Table, ledger: list[SongEntry], clock: StageClock
    ) -> tuple[pa.Table, list[SongEntry]]:
        """`clips` with every column that is still missing, and what is left of them."""
        config = self.job.config
        if self.pitch is not None:
            clips, ledger = self.pitch.add(clips, ledger, clock)
        for encoder in self.encoders:
            clips = encoder.add_columns(clips, config, clock)
        if self.embedder is not None:
            wavs = DecodedClips(clips["audio"], config.audio.subtype)
            with clock.stage("xvector"):
                vectors = embed_clips(
                    wavs, config.audio.sample_rate, self.embedder, config.resample
                )
            clips = clips.append_column(XVECTOR_COLUMN, pa.array(vectors, pa.list_(pa.float32())))
        return clips, ledger

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
        """For the footer's environment: which packages had weights, what is not float32."""
        onnx = any(each.cfg.name.endswith("-onnx") for each in self.encoders)
        numerics = environment_of_networks(self.job.f0_networks, onnx)
        others = [f"{each.cfg.name} {each.cfg.dtype}" for each in self.encoders]
        others = [words for words in others if not words.endswith(" float32")]
        if others:
            numerics["dtype"] = ", ".join(others)
        return numerics


def _sha256_unchanged(key: str, weights: Mapping[str, WeightFile]) -> str | None:
    if key not in weights:
        return None
    require_unchanged(key, weights[key])
    return weights[key].sha256


@contextmanager
def _loading(section: str) -> Iterator[None]:
    """What the user can put right about a model that does not load, in words that name it."""
    import torch

    try:
        with name_setting_in_errors(section):
            yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"{section}: there is too little memory to load it ({error}); lower "
            "workers.max_workers, or raise workers.gpus_per_worker where it is a GPU's"
        ) from error
