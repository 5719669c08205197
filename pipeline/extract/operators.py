"""What runs in a worker: the CPU half of a task, the units half, and both composed.

The classes take and give one-row Arrow tables, as Ray Data hands them out, and are called in the
driver's own process for `--local` and in tests.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict

import pyarrow as pa

from pipeline.cluster.task_rows import COMMITTED, guarded, read_result, read_row, result_row
from pipeline.cluster.workload import BUNDLED_GB, GB_PER_CHECKPOINT_GB, Heartbeat, Needs, Workload
from pipeline.dataset.ledger import SongEntry
from pipeline.extract.halves import CpuHalf, UnitsHalf
from pipeline.extract.job import ExtractJob
from pipeline.storage.weight_files import WeightFile
from stages.chain import StageClock
from stages.f0.crepe import cost_notice

# A worker's memory: libraries and one song's buffers, then what each minute of its task adds
# (FLAC clips, f0, units in float32 while packed). Generous: one-minute tasks peak at 0.7 GB,
# three hours of singing in one task below 2 GB.
_WORKER_BASE_GB = 0.8
_WORKER_GB_PER_MINUTE = 0.02

_BATCH_GB = 1.0


class PrepareTask:
    """The CPU operator before a GPU operator: the clips travel as one Arrow IPC buffer."""

    def __init__(self, job: ExtractJob, heartbeat: Heartbeat) -> None:
        self.job = job
        self.heartbeat = heartbeat

    @functools.cached_property
    def cpu(self) -> CpuHalf:
        return CpuHalf(self.job, self.heartbeat)

    def __call__(self, row: pa.Table) -> pa.Table:
        task, crashed = read_row(row)
        return guarded(task, lambda clock: self._run(task, crashed, clock))

    def _run(self, task: int, crashed: list[str], clock: StageClock) -> bytes | None:
        clips, ledger = self.cpu.prepare(task, crashed, clock)
        entries = json.dumps([asdict(entry) for entry in ledger])
        clips = clips.replace_schema_metadata({**(clips.schema.metadata or {}), "ledger": entries})
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

    def __init__(self, job: ExtractJob) -> None:
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

        return guarded(before.task, run)


def probe_extraction(job: ExtractJob, task: int, song_id: str) -> None:
    """One song through both halves, nothing written: does it kill the process?"""
    cpu, clock = CpuHalf(job, lambda *_: None), StageClock()
    try:
        clips, ledger = cpu.prepare(task, (), clock, only=song_id)
        UnitsHalf(job).complete(clips, ledger, clock)
    finally:
        cpu.close()


def load_extract_models(job: ExtractJob) -> None:
    """Everything a worker loads, for finding out whether that kills it."""
    UnitsHalf(job)


def extraction(job: ExtractJob) -> Workload:
    """The tasks of a dataset."""

    def notice(on_gpu: bool) -> str | None:
        f0 = job.config.f0
        rate = job.config.audio.sample_rate
        return cost_notice(f0, on_gpu and f0.device != "cpu", rate) if job.makes_f0 else None

    needs = Needs(
        base_gb=_WORKER_BASE_GB,
        gb_per_minute=_WORKER_GB_PER_MINUTE,
        models_gb=_models_gb(job.weights, job.f0_networks),
        devices=_devices(job),
        remedy="lower plan.task_minutes (new dataset) or workers.cpus_per_worker",
    )
    loads = bool(job.weights or job.f0_networks)
    return Workload(
        job=job,
        needs=needs,
        whole=ExtractTask,
        halves=(PrepareTask, FinishTask),
        load=load_extract_models if loads else None,
        probe=probe_extraction,
        notice=notice,
    )


def _models_gb(weights: Mapping[str, WeightFile], f0_networks: Collection[str]) -> float:
    """What the models add to a worker that makes pitch, units and x-vectors."""
    sizes = [weights[key].size for key in weights if key.endswith(".checkpoint")]
    models = sum(GB_PER_CHECKPOINT_GB * size / 2**30 + _BATCH_GB for size in sizes)
    return models + len(set(f0_networks) - {"rmvpe"}) * BUNDLED_GB


def _devices(job: ExtractJob) -> dict[str, str]:
    config, over = job.config, job.taken_over
    taken = {identity.name for identity in over.units} if over else set()
    devices: dict[str, str] = {
        f"{section}.device": encoder.device
        for section, encoder in config.all_encoders.items()
        if encoder.name not in taken
    }
    if config.xvector.checkpoint is not None and not (over and over.xvector):
        devices["xvector.device"] = config.xvector.device
    if job.f0_networks:
        devices["f0.device"] = config.f0.device
    return devices
