"""The tasks of an extraction as a workload: their operators, memory and devices.

Tested by tests/pipeline/cluster/test_ray_graph.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.cluster.workload import GB_PER_CHECKPOINT_GB, GB_PER_F0_NETWORK, Needs, Workload
from pipeline.extract.job import ExtractJob
from pipeline.extract.task import (
    ExtractTask,
    FinishTask,
    PrepareTask,
    load_task_models,
    probe_song,
)
from pipeline.storage.weight_files import WeightFile
from stages.f0.crepe import cost_notice

# Memory of a worker: libraries and the buffers of one song, then what each minute of its task adds
# (FLAC clips, f0, units in float32 until they are packed). Generous: one-minute tasks peak at
# 0.7 GB, three hours of singing in one task below 2 GB.
_WORKER_BASE_GB = 0.8
_WORKER_GB_PER_MINUTE = 0.02

_BATCH_GB = 1.0


def extraction(job: ExtractJob) -> Workload:
    """Return the tasks of a dataset as a workload."""

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
        split=(PrepareTask, FinishTask),
        load=load_task_models if loads else None,
        probe=probe_song,
        notice=notice,
    )


def _models_gb(weights: Mapping[str, WeightFile], f0_networks: Collection[str]) -> float:
    """Return the memory that the models add to a worker which runs them all."""
    sizes = [weights[key].size for key in weights if key.endswith(".checkpoint")]
    models = sum(GB_PER_CHECKPOINT_GB * size / 2**30 + _BATCH_GB for size in sizes)
    return models + len(set(f0_networks) - {"rmvpe"}) * GB_PER_F0_NETWORK


def _devices(job: ExtractJob) -> dict[str, str]:
    """Return the device of each network that runs, by the key that sets it."""
    config = job.config
    devices: dict[str, str] = {
        f"{section}.device": encoder.device
        for section, encoder in config.all_encoders.items()
        if encoder.name not in job.units_taken_over
    }
    if job.makes_xvector:
        devices["xvector.device"] = config.xvector.device
    if job.f0_networks:
        devices["f0.device"] = config.f0.device
    return devices
