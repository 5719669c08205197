"""Converting the songs of a folder or a manifest, each exactly once, resumable at any point.

lock -> same settings? -> list -> plan -> what is missing -> run -> balance
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from models.synthesizer.onnx import MELODY
from models.synthesizer.voice import DESCRIPTION, WEIGHTS
from pipeline.cluster.environment import mixed, threads_before
from pipeline.cluster.run_tasks import Work, run_tasks
from pipeline.convert.command import Request
from pipeline.convert.config import ConvertConfig
from pipeline.convert.ledger import (
    CONVERTED,
    ConvertAccount,
    Record,
    balance_conversion,
    is_whole,
    output_names,
    read_records,
)
from pipeline.convert.operators import ConvertJob, conversion
from pipeline.convert.output_file import check_output
from pipeline.convert.speaker_mix import is_mix_file
from pipeline.errors import UserError, first_names
from pipeline.fingerprint import counted, differences, fingerprint, neutral_values
from pipeline.songs.balance import QUARANTINED
from pipeline.songs.corpus import Corpus, ListedSong, left_alone, list_corpus
from pipeline.songs.plan import PlannedSong, Task, append_plan, load_plan, plan_songs
from pipeline.storage.atomic import read_info, sweep, write_info
from pipeline.storage.lock import lock
from pipeline.storage.weight_files import WeightFile, read_weights
from pipeline.train.find_voice import SOVITS_CONFIG, is_graph
from stages.retrieval import index_files

VERSION = 1
_INFO = "convert.json"

# Of these files the SHA-256 counts in place of the path.
_FILES = (
    "encoder.checkpoint",
    "f0.checkpoint",
    "enhancer.checkpoint",
    "units.index",
    "units.codebook",
)

# As SongFile and write_conversion_report name what they write.
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.\w+|\..+\.html\.[0-9a-f]{8}")


@dataclass(frozen=True)
class BatchOptions:
    """How to run, as opposed to what to make (that is ConvertConfig)."""

    ray_address: str | None = None
    local: bool = False  # in this process, one song after the other, without Ray
    retry_quarantined: bool = False
    report: bool = False  # a page with players and pictures beside each song


@dataclass
class BatchOutcome:
    """What a run found and did, for the summary."""

    account: ConvertAccount = field(default_factory=ConvertAccount)
    work: Work = field(default_factory=Work)
    notices: list[str] = field(default_factory=list)


def convert_folder(
    request: Request, source: Path, output: Path, options: BatchOptions, console: Console
) -> BatchOutcome:
    """Make or complete the folder `output` of converted songs from the folder or manifest `source`.

    A song of a/b.mp3 becomes a/b.wav (or what output.format says); `output_names` has the rest.
    A song that changed since, or whose output is not there as it was written, is done again.
    Raises: UserError (settings, songs, cluster), StorageFault, SongBug; all leave what was
    committed intact, and the same command goes on from there.
    """
    folder = output.absolute()
    config = _with_absolute_paths(request.config)
    suffix = f".{config.output.format}"
    check_output(folder / f"song{suffix}", config.output, config.audio.sample_rate)
    checkpoint = request.checkpoint.absolute()
    weights = read_weights(_files(checkpoint, config))
    settings = _fingerprinted(config, weights)
    corpus = list_corpus(source, config.voice.speaker or "a mix")
    _refuse_nested(folder, source)
    with lock(folder):
        outcome = BatchOutcome()
        tasks, records, settings = _examine(folder, settings, outcome)
        asked = _ask(corpus, tasks, config, console)
        tasks |= {task.index: task for task in asked}
        names = output_names(tasks, suffix)
        _refuse_to_overwrite(folder, corpus, names)
        sweep(folder)
        _write_info(folder, checkpoint, config, settings)
        if asked:
            append_plan(folder, asked)
        job = ConvertJob(
            folder=folder,
            corpus=corpus.root,
            config=config,
            fingerprint=fingerprint(settings),
            weights=weights,
            gone=_gone(corpus, tasks),
            threads=threads_before((r.environment for r in records.values()), config.workers),
            checkpoint=checkpoint,
            encoder=request.voice.encoder,
            report=options.report,
        )
        outcome.notices += left_alone(corpus)
        if job.gone:
            outcome.notices.append(
                f"{len(job.gone)} planned songs are not there now ({first_names(sorted(job.gone))})"
            )
        missing = _missing(job, tasks, records, options.retry_quarantined, outcome)
        if missing:
            outputs = [folder / names[index] for index in missing]
            outcome.work = _run(job, missing, outputs, options, console)
            outcome.notices += outcome.work.notices
        records, damaged = read_records(folder, tasks)
        outcome.account = balance_conversion(folder, tasks, records)
        outcome.account.problems += map(str, damaged)
        made = [r.environment for r in records.values() if r.entry.status == CONVERTED]
        outcome.notices += mixed("songs of one folder", made)
        return outcome


def _with_absolute_paths(config: ConvertConfig) -> ConvertConfig:
    """Workers of a cluster start in other folders."""
    for key in (*_FILES, "voice.mix"):
        section, name = key.split(".")
        values = getattr(config, section)
        path = getattr(values, name)
        if path is not None and (key != "voice.mix" or is_mix_file(path)):
            absolute = str(Path(path).expanduser().absolute())
            config = replace(config, **{section: replace(values, **{name: absolute})})
    return config


def _files(checkpoint: Path, config: ConvertConfig) -> dict[str, str]:
    """Everything that workers read besides songs, by the key that names it."""
    files = _voice_files(checkpoint)
    for key in _FILES:
        section, name = key.split(".")
        path = getattr(getattr(config, section), name)
        if path is not None:
            files[key] = Path(path)
    if "enhancer.checkpoint" in files:
        files["enhancer.config"] = files["enhancer.checkpoint"].with_name("config.json")
    speaker, mix = config.voice.speaker, config.voice.mix
    if "units.index" in files and speaker is not None:
        files["units.index"], files["units.index_note"] = index_files(files["units.index"], speaker)
    if mix is not None and is_mix_file(mix):
        files["voice.mix"] = Path(mix)
    return {key: str(path) for key, path in files.items()}


def _voice_files(checkpoint: Path) -> dict[str, Path]:
    """Of a voice, without the description of ours: the weights' file and the graphs hold the hash
    of all but its licence."""
    if checkpoint.name in (WEIGHTS, DESCRIPTION):
        return {"voice.checkpoint": checkpoint.with_name(WEIGHTS)}
    beside = checkpoint.with_name(MELODY if is_graph(checkpoint) else SOVITS_CONFIG)
    others = {f"voice.{beside.name}": beside} if beside.is_file() else {}
    return {"voice.checkpoint": checkpoint, **others}


def _fingerprinted(config: ConvertConfig, weights: Mapping[str, WeightFile]) -> dict[str, Any]:
    """What changes the output, files by their SHA-256."""
    left_out = {"compute.device", *weights, *_FILES, *_without_effect(config)}
    settings = {key: value for key, value in counted(config).items() if key not in left_out}
    settings["encoder.dtype"] = config.encoder.dtype
    if config.pitch.transpose != "auto":
        settings["pitch.transpose"] = float(config.pitch.transpose)  # "0" and "0.0" are the same
    hashes = {f"{key}_sha256": file.sha256 for key, file in weights.items()}
    return {"version": VERSION, **settings, **hashes}


def _without_effect(config: ConvertConfig) -> set[str]:
    """Settings of what is not used."""
    units, idle = config.units, set()
    if units.index is None:
        idle.add("units.index_ratio")
    if units.codebook is None:
        idle.add("units.codebook_ratio")
    if units.index is None and units.codebook is None:
        idle.add("units.protect")
    if config.enhancer.checkpoint is None:
        idle |= {"enhancer.adaptive_key", "enhancer.silence_front"}
    return idle


def _refuse_nested(folder: Path, source: Path) -> None:
    """Songs that are written into the folder they are read from would be converted next time."""
    here = folder.resolve()
    if source.is_dir() and here.is_relative_to(source.resolve()):
        raise UserError(f"{folder} lies in {source}, whose songs are read; name another folder")
    if (folder / "dataset.json").exists():
        raise UserError(f"{folder} is a dataset; name another folder for the converted songs")


def _examine(
    folder: Path, settings: dict[str, Any], outcome: BatchOutcome
) -> tuple[dict[int, Task], dict[int, Record], dict[str, Any]]:
    """Return the plan, the ledger, and the settings to go on with: the recorded ones if they agree.

    Raises: UserError: when the folder has songs that were made with other settings.
    """
    if not (folder / _INFO).exists():
        for name in ("plan", "ledger"):
            if (folder / name).exists():
                raise UserError(f"{folder} holds {name}/ but no {_INFO}: not touched")
        return {}, {}, settings
    recorded = read_info(folder / _INFO)["settings"]
    tasks = load_plan(folder)
    records, damaged = read_records(folder, tasks)
    differing = differences(recorded, settings, neutral_values(ConvertConfig))
    if differing and (records or damaged):
        raise UserError(
            f"{folder} was made with other settings ({'; '.join(differing)}); choose a new "
            "folder, or delete this one to start over"
        )
    outcome.notices += [f"{error}; its song is done again" for error in damaged]
    return tasks, records, settings if differing else recorded


def _ask(
    corpus: Corpus, tasks: Mapping[int, Task], config: ConvertConfig, console: Console
) -> list[Task]:
    """Tasks for songs that are new, longest first, and those of songs that changed, in place."""
    owners = {task.songs[0].song_id: task for task in tasks.values()}
    wanted = [
        source
        for source in corpus.songs
        if source.song_id not in owners or _differs(source, owners[source.song_id].songs[0])
    ]
    if not wanted:
        return []
    console.print(f"planning {len(wanted)} songs", highlight=False)
    songs = plan_songs(corpus, wanted, config.decode, config.workers.scratch)
    renewed, added = [], []
    for split, song in songs.values():
        owner = owners.get(song.song_id)
        if owner is None:
            added.append((split, song))
        else:
            renewed.append(replace(owner, songs=(song,)))
    added.sort(key=lambda each: (-each[1].duration_s, each[1].song_id))
    first = max(tasks, default=-1) + 1
    return renewed + [Task(first + i, split, (song,)) for i, (split, song) in enumerate(added)]


def _differs(now: ListedSong, then: PlannedSong) -> bool:
    return (now.size, now.mtime_ns, now.path) != (then.size, then.mtime_ns, then.path)


def _gone(corpus: Corpus, tasks: Mapping[int, Task]) -> frozenset[str]:
    planned = {task.songs[0].song_id for task in tasks.values()}
    return frozenset(planned - {source.song_id for source in corpus.songs})


def _refuse_to_overwrite(folder: Path, corpus: Corpus, names: Mapping[int, str]) -> None:
    """Neither a song that is read, nor, by the first run, what else the folder holds."""
    outputs = {os.path.realpath(folder / name): name for name in names.values()}
    root = os.fsencode(corpus.root)
    for song in corpus.songs:
        path = os.fsdecode(os.path.realpath(os.path.join(root, song.path)))
        if path in outputs:
            raise UserError(f"{path} is a song that is read; name another folder than {folder}")
    if (folder / _INFO).exists():
        return
    for path, name in outputs.items():
        if os.path.lexists(path):
            raise UserError(
                f"{folder} holds {name}, which would be overwritten; name an empty folder"
            )


def _write_info(
    folder: Path, checkpoint: Path, config: ConvertConfig, settings: dict[str, Any]
) -> None:
    """convert.json, for people and for the next run."""
    info = {
        "version": VERSION,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "config": dataclasses.asdict(config),
        "voice": str(checkpoint),
        "voice_sha256": settings["voice.checkpoint_sha256"],
        "encoder_sha256": settings.get("encoder.checkpoint_sha256"),
    }
    write_info(folder, _INFO, info)


def _missing(
    job: ConvertJob,
    tasks: Mapping[int, Task],
    records: Mapping[int, Record],
    retry_quarantined: bool,
    outcome: BatchOutcome,
) -> dict[int, Task]:
    """Tasks without an entry for the song as it is now, or without the output that it tells of."""
    missing, lost = {}, []
    for index, task in tasks.items():
        record = records.get(index)
        asked = (task.task_id, job.fingerprint)
        if record is None or (record.task_id, record.fingerprint) != asked:
            missing[index] = task
        elif not is_whole(job.folder, record.entry):
            missing[index] = task
            lost.append(record.entry.output)
        elif retry_quarantined and record.entry.status == QUARANTINED:
            missing[index] = task
    if lost:
        outcome.notices.append(
            f"{len(lost)} converted songs are missing or damaged ({first_names(lost)}); they are "
            "converted again"
        )
    return missing


def _run(
    job: ConvertJob,
    missing: dict[int, Task],
    outputs: Sequence[Path],
    options: BatchOptions,
    console: Console,
) -> Work:
    hours = sum(task.duration_s for task in missing.values()) / 3600
    console.print(f"{len(missing)} songs to do, {hours:.2f} h of audio", highlight=False)
    _sweep_songs(outputs)
    work = run_tasks(conversion(job), missing, options.ray_address, options.local, console)
    _sweep_songs(outputs)
    return work


def _sweep_songs(outputs: Iterable[Path]) -> None:
    """Remove what killed workers left half-written in the folders of `outputs`."""
    for folder in {path.parent for path in outputs}:
        for path in folder.glob(".*"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink(missing_ok=True)
