"""The task of a conversion in a worker: one song, from its file to its entry in the ledger.

Tested by tests/pipeline/convert/test_folder.py.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from models.synthesizer.voice import VoiceEncoder
from pipeline.cluster.device import choose_device
from pipeline.cluster.environment import (
    environment,
    environment_of_networks,
    limit_threads,
    threads_of,
)
from pipeline.cluster.task_rows import CRASHED, guarded, read_row
from pipeline.cluster.workload import (
    GB_PER_CHECKPOINT_GB,
    GB_PER_F0_NETWORK,
    Heartbeat,
    Job,
    Needs,
    Workload,
)
from pipeline.convert.command import Request, load_models, write_page
from pipeline.convert.config import ConvertConfig
from pipeline.convert.ledger import (
    ConvertEntry,
    Record,
    commit_record,
    converted,
    output_names,
    quarantined,
)
from pipeline.convert.song import Converter, Progress
from pipeline.errors import name_song_in_errors
from pipeline.songs.plan import PlannedSong, Task, load_plan
from pipeline.songs.source_file import check_unchanged, require_mounted
from pipeline.storage.scratch import Scratch
from pipeline.storage.weight_files import require_unchanged
from pipeline.train.find_voice import is_graph, read_any_voice
from stages.chain import StageClock
from stages.decode import Decoder
from stages.errors import BadInput, Reason
from stages.f0.crepe import cost_notice

# Memory of a worker: libraries; the voice as it is read and as it runs; buffers of networks for a
# piece of 15 s; f0 of each minute. Generous: so-vits-svc's networks at 44.1 kHz peak at 1.3 GB with
# pieces of 7 s.
_WORKER_BASE_GB = 0.8
_PIECE_GB = 1.0
_WORKER_GB_PER_MINUTE = 0.002


@dataclass(frozen=True)
class ConvertJob(Job[ConvertConfig]):
    """The job of a conversion.

    checkpoint: the file of the voice's weights. encoder: the voice's, as the driver completed it.
    report: each song gets a page beside it.
    """

    checkpoint: Path = field(kw_only=True)
    encoder: VoiceEncoder = field(kw_only=True)
    report: bool = False


class ConvertTask:
    """The operator of a whole task."""

    def __init__(self, job: ConvertJob, heartbeat: Heartbeat) -> None:
        self.job = job
        self.heartbeat = heartbeat
        limit_threads(job)
        self.tasks = load_plan(job.folder)
        self.names = output_names(self.tasks, f".{job.config.output.format}")
        self.scratch = Scratch(job.config.workers.scratch)
        self.decoder = Decoder(job.config.decode, self.scratch.folder)

    @functools.cached_property
    def request(self) -> Request:
        return load_request(self.job)

    @functools.cached_property
    def converter(self) -> Converter:
        return Converter(load_models(self.request), self.job.config)

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        config = self.job.config
        onnx = (
            config.compute.backend == "onnx"
            or is_graph(self.job.checkpoint)
            or config.encoder.name.endswith("-onnx")
        )
        devices = {key: choose_device(device, key) for key, device in _devices(config).items()}
        networks = environment_of_networks(config.f0.networks, onnx)
        return environment(threads_of(self.job)) | networks | devices

    def __call__(self, row: pa.Table) -> pa.Table:
        index, crashed = read_row(row)
        return guarded(index, lambda clock: self._run(self.tasks[index], crashed, clock))

    def close(self) -> None:
        self.decoder.close()
        self.scratch.close()

    def convert(self, task: Task, folder: Path, *, crashed: bool = False) -> ConvertEntry:
        """Convert the task's song into `folder` and return its ledger entry.

        Faults of the song itself end here, as a quarantined entry.
        crashed: a worker process died on the song; it is quarantined unread.
        """
        (planned,) = task.songs
        name = self.names[task.index]
        output = folder / name
        page = output.with_suffix(".html")
        path = os.path.join(os.fsencode(self.job.corpus), planned.path)
        sha256 = None
        try:
            if crashed:
                raise BadInput(Reason.CRASHED, CRASHED)
            sha256 = check_unchanged(planned, path)
            conversion = self.converter.convert(
                planned.song_id,
                Path(os.fsdecode(path)),
                output,
                self.decoder,
                self._progress(planned),
            )
            if self.job.report:
                write_page(self.request, [conversion], page)
        except BadInput as fault:
            if fault.reason == Reason.MISSING:
                require_mounted(planned, path, self.job.gone)
            for outdated in (output, page):  # of an earlier version of the song
                outdated.unlink(missing_ok=True)
            return quarantined(planned, sha256, name, fault)
        return converted(planned, sha256, name, conversion)

    def _run(self, task: Task, crashed: list[str], clock: StageClock) -> None:
        (planned,) = task.songs
        with clock.stage("convert"):
            with name_song_in_errors(planned.song_id):
                entry = self.convert(task, self.job.folder, crashed=planned.song_id in crashed)
        with clock.stage("write"):
            record = Record(task.index, task.task_id, self.job.fingerprint, self.environment, entry)
            commit_record(self.job.folder, record)
        self.heartbeat(planned.song_id, planned.duration_s, entry.status)

    def _progress(self, planned: PlannedSong) -> Progress:
        done = 0.0

        def advance(seconds: float) -> None:
            nonlocal done
            done = min(planned.duration_s, done + seconds)
            self.heartbeat(planned.song_id, done, None)

        return advance


def load_request(job: ConvertJob) -> Request:
    """Return the voice and its settings.

    Raises: UserError: when a file that the run reads changed since it began.
    """
    for key, weights in job.weights.items():
        require_unchanged(key, weights)
    voice = replace(read_any_voice(job.checkpoint), encoder=job.encoder)
    return Request(job.checkpoint, voice, job.config)


def load_everything(job: ConvertJob) -> None:
    """Load every model that a worker loads, to see whether that kills the process."""
    load_models(load_request(job))


def probe_conversion(job: ConvertJob, index: int, song_id: str) -> None:
    """Convert the song of a task into a scratch folder, to see whether it kills the process."""
    worker = ConvertTask(job, lambda *_: None)
    try:
        worker.convert(worker.tasks[index], worker.scratch.folder)
    finally:
        worker.close()


def _devices(config: ConvertConfig) -> dict[str, str]:
    """Return the device of each network, by the key that sets it."""
    devices: dict[str, str] = {"compute.device": config.compute.device}
    if config.encoder.device != "auto":  # auto is the device of the voice
        devices["encoder.device"] = config.encoder.device
    if config.f0.networks:
        devices["f0.device"] = config.f0.device
    return devices


def conversion(job: ConvertJob) -> Workload:
    """Return the songs to convert as a workload."""
    config = job.config
    sizes = [file.size for file in job.weights.values()]  # an index too may be of gigabytes
    if "voice.checkpoint" in job.weights:
        sizes.append(job.weights["voice.checkpoint"].size)  # once as read, once in the network
    networks = len(set(config.f0.networks) - {"rmvpe"})
    models_gb = GB_PER_CHECKPOINT_GB * sum(sizes) / 2**30 + networks * GB_PER_F0_NETWORK
    needs = Needs(
        base_gb=_WORKER_BASE_GB,
        gb_per_minute=_WORKER_GB_PER_MINUTE,
        models_gb=models_gb + _PIECE_GB,
        devices=_devices(config),
        remedy="lower workers.cpus_per_worker",
    )

    def notice(on_gpu: bool) -> str | None:
        return cost_notice(
            config.f0, on_gpu and config.f0.device != "cpu", config.audio.sample_rate
        )

    return Workload(
        job=job,
        needs=needs,
        whole=ConvertTask,
        split=None,
        load=load_everything,
        probe=probe_conversion,
        notice=notice,
    )
