"""Converting the songs of a folder or a manifest, each exactly once, resumable at any point."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from models.synthesizer.onnx import MELODY
from models.synthesizer.voice import DESCRIPTION, WEIGHTS
from pipeline.cluster.environment import mixed, threads_before
from pipeline.cluster.resumable_run import TaskOutcome, TaskPlan, complete, with_added
from pipeline.cluster.run_tasks import Work, run_tasks
from pipeline.convert.command import Request
from pipeline.convert.config import AUTOMATIC, ConvertConfig
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
from pipeline.songs.corpus import Corpus, ListedSong, list_corpus, named_as_planned, not_listed
from pipeline.songs.plan import PlannedSong, Task, append_plan, load_plan, plan_songs
from pipeline.storage.atomic import read_info, write_info
from pipeline.storage.weight_files import WeightFile, read_weights
from pipeline.train.find_voice import SOVITS_CONFIG, is_graph
from stages.retrieval import index_files

VERSION = 1
_INFO = "convert.json"

# The SHA-256 of these files counts in place of their path.
_FILES = (
    "encoder.checkpoint",
    "f0.checkpoint",
    "enhancer.checkpoint",
    "units.index",
    "units.codebook",
)

# Temporary names of SongFile and write_conversion_report.
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.\w+|\..+\.html\.[0-9a-f]{8}")

BatchOutcome = TaskOutcome[ConvertAccount]


@dataclass(frozen=True)
class BatchOptions:
    """Options that change how a run works, not its output (that is ConvertConfig)."""

    ray_address: str | None = None
    local: bool = False  # in this process, one song after the other, without Ray
    retry_quarantined: bool = False
    report: bool = False  # a page with players and pictures beside each song


def convert_folder(
    request: Request, source: Path, output: Path, options: BatchOptions, console: Console
) -> BatchOutcome:
    """Make or complete the folder `output` of converted songs from the folder or manifest `source`.

    A song of a/b.mp3 becomes a/b.wav (or what output.format says); `output_names` has the rest.
    A song that changed since, or whose output is missing or damaged, is converted again. Committed
    songs stay, whatever happens later.

    Raises: UserError: when settings, songs or cluster are wrong; StorageFault: when the disk or the
    cluster fails; SongBug: when our code fails on a song.
    """
    folder = output.absolute()
    config = _with_absolute_paths(request.config)
    check_output(folder / f"song.{config.output.format}", config.output, config.audio.sample_rate)
    request = replace(request, checkpoint=request.checkpoint.absolute(), config=config)
    weights = read_weights(_files(request.checkpoint, config))
    settings = _fingerprinted(config, weights)
    return complete(FolderConversion(folder, request, source, settings, weights, options, console))


@dataclass
class FolderConversion:
    """The steps of the conversion of a folder, as `complete` calls them. A task is one song.

    settings: those that change the output. weights: files that have to be loaded.
    """

    folder: Path
    request: Request
    source: Path
    settings: dict[str, Any]
    weights: dict[str, WeightFile]
    options: BatchOptions
    console: Console
    work: Work = field(default_factory=Work)
    notices: list[str] = field(default_factory=list)

    @property
    def config(self) -> ConvertConfig:
        return self.request.config

    def list_inputs(self) -> None:
        self.corpus = list_corpus(self.source, self.config.voice.speaker or "a mix")
        _refuse_nested(self.folder, self.source)

    def check_settings(self) -> None:
        """Refuse other settings than those of the songs there; else use the recorded ones."""
        if not (self.folder / _INFO).exists():
            for name in ("plan", "ledger"):
                if (self.folder / name).exists():
                    raise UserError(
                        f"{self.folder} has {name}/ but no {_INFO}, so it is not a folder of "
                        "converted songs; name another folder"
                    )
            return
        recorded = read_info(self.folder / _INFO)["settings"]
        differing = differences(recorded, self.settings, neutral_values(ConvertConfig))
        if not differing:
            self.settings = recorded
        elif any(read_records(self.folder, load_plan(self.folder))):
            raise UserError(
                f"{self.folder} was made with other settings ({'; '.join(differing)}); choose a "
                "new folder, or delete this one to start over"
            )

    def plan(self) -> TaskPlan[Record]:
        tasks = load_plan(self.folder)
        self.corpus = named_as_planned(
            self.corpus, (song.song_id for task in tasks.values() for song in task.songs)
        )
        records, damaged = read_records(self.folder, tasks)
        self.notices += [f"{error}; its song is converted again" for error in damaged]
        added = self._plan_songs(tasks)
        tasks = with_added(tasks, added)
        self._refuse_to_overwrite(tasks)
        self.notices += not_listed(self.corpus)
        gone = _gone(self.corpus, tasks)
        if gone:
            names = first_names(sorted(gone))
            self.notices.append(f"{len(gone)} planned songs are not there now ({names})")
        environments = (record.environment for record in records.values())
        threads = threads_before(environments, self.config.workers)
        return TaskPlan(tasks, added, self._committed(tasks, records), gone, threads)

    def begin(self, plan: TaskPlan[Record]) -> None:
        self._write_info()
        if plan.added:
            append_plan(self.folder, plan.added)

    def run(self, plan: TaskPlan[Record]) -> None:
        if not plan.missing:
            return
        self.console.print(
            f"{len(plan.missing)} songs to do, {plan.missing_hours:.2f} h of audio", highlight=False
        )
        job = ConvertJob(
            folder=self.folder,
            corpus=self.corpus.root,
            config=self.config,
            fingerprint=fingerprint(self.settings),
            weights=self.weights,
            gone=plan.gone,
            threads=plan.threads,
            checkpoint=self.request.checkpoint,
            encoder=self.request.voice.encoder,
            report=self.options.report,
        )
        names = self._output_names(plan.tasks)
        outputs = [self.folder / names[index] for index in plan.missing]
        _sweep_songs(outputs)
        self.work = run_tasks(
            conversion(job),
            plan.missing,
            self.options.ray_address,
            self.options.local,
            self.console,
        )
        _sweep_songs(outputs)
        self.notices += self.work.notices

    def balance(self, plan: TaskPlan[Record]) -> BatchOutcome:
        """Balance the ledger and the outputs with the plan."""
        records, damaged = read_records(self.folder, plan.tasks)
        account = balance_conversion(self.folder, plan.tasks, records)
        account.problems += map(str, damaged)
        made = [r.environment for r in records.values() if r.entry.status == CONVERTED]
        self.notices += mixed("songs of one folder", made)
        return TaskOutcome(account, self.work, self.notices)

    def _plan_songs(self, tasks: Mapping[int, Task]) -> list[Task]:
        """Return tasks for songs that are new, longest first, and in place for changed ones."""
        owners = {task.songs[0].song_id: task for task in tasks.values()}
        to_plan = [
            source
            for source in self.corpus.songs
            if source.song_id not in owners or _differs(source, owners[source.song_id].songs[0])
        ]
        if not to_plan:
            return []
        self.console.print(f"planning {len(to_plan)} songs", highlight=False)
        songs = plan_songs(self.corpus, to_plan, self.config.decode, self.config.workers.scratch)
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

    def _refuse_to_overwrite(self, tasks: Mapping[int, Task]) -> None:
        """Refuse outputs that are input songs or, in a new folder, files of the user."""
        names = self._output_names(tasks).values()
        outputs = {os.path.realpath(self.folder / name): name for name in names}
        root = os.fsencode(self.corpus.root)
        for song in self.corpus.songs:
            path = os.fsdecode(os.path.realpath(os.path.join(root, song.path)))
            if path in outputs:
                raise UserError(
                    f"{path} is an input song and would be overwritten; name another folder than "
                    f"{self.folder}"
                )
        if (self.folder / _INFO).exists():
            return
        for path, name in outputs.items():
            if os.path.lexists(path):
                raise UserError(
                    f"{self.folder} has a file {name}, which would be overwritten; name an empty "
                    "folder"
                )

    def _committed(
        self, tasks: Mapping[int, Task], records: Mapping[int, Record]
    ) -> dict[int, Record]:
        """Return the records of songs that are done: of the song as it is, its output whole."""
        wanted = fingerprint(self.settings)
        committed, lost = {}, []
        for index, task in tasks.items():
            record = records.get(index)
            if record is None or (record.task_id, record.fingerprint) != (task.task_id, wanted):
                continue
            if not is_whole(self.folder, record.entry):
                lost.append(record.entry.output)
            elif not (self.options.retry_quarantined and record.entry.status == QUARANTINED):
                committed[index] = record
        if lost:
            self.notices.append(
                f"{len(lost)} converted songs are missing or damaged ({first_names(lost)}); they "
                "are converted again"
            )
        return committed

    def _output_names(self, tasks: Mapping[int, Task]) -> dict[int, str]:
        return output_names(tasks, f".{self.config.output.format}")

    def _write_info(self) -> None:
        """Write convert.json, for people and for the next run."""
        info = {
            "version": VERSION,
            "fingerprint": fingerprint(self.settings),
            "settings": self.settings,
            "config": dataclasses.asdict(self.config),
            "voice": str(self.request.checkpoint),
            "voice_sha256": self.settings["voice.checkpoint_sha256"],
            "encoder_sha256": self.settings.get("encoder.checkpoint_sha256"),
        }
        write_info(self.folder, _INFO, info)


def _with_absolute_paths(config: ConvertConfig) -> ConvertConfig:
    """Return `config` with absolute paths, since workers start in other folders."""
    for key in (*_FILES, "voice.mix"):
        section, name = key.split(".")
        values = getattr(config, section)
        path = getattr(values, name)
        if path is not None and (key != "voice.mix" or is_mix_file(path)):
            absolute = str(Path(path).expanduser().absolute())
            config = replace(config, **{section: replace(values, **{name: absolute})})
    return config


def _files(checkpoint: Path, config: ConvertConfig) -> dict[str, str]:
    """Return the files that workers read besides songs, by the key that names them."""
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
    """Return the files of a voice.

    Its description is left out: the weights and the graphs have a hash of all but its licence.
    """
    if checkpoint.name in (WEIGHTS, DESCRIPTION):
        return {"voice.checkpoint": checkpoint.with_name(WEIGHTS)}
    beside = checkpoint.with_name(MELODY if is_graph(checkpoint) else SOVITS_CONFIG)
    others = {f"voice.{beside.name}": beside} if beside.is_file() else {}
    return {"voice.checkpoint": checkpoint, **others}


def _fingerprinted(config: ConvertConfig, weights: Mapping[str, WeightFile]) -> dict[str, Any]:
    """Return the settings that change the output, files by their SHA-256."""
    left_out = {"compute.device", *weights, *_FILES, *_without_effect(config)}
    settings = {key: value for key, value in counted(config).items() if key not in left_out}
    settings["encoder.dtype"] = config.encoder.dtype
    if config.pitch.transpose not in AUTOMATIC:
        settings["pitch.transpose"] = float(config.pitch.transpose)  # "0" and "0.0" are the same
    hashes = {f"{key}_sha256": file.sha256 for key, file in weights.items()}
    return {"version": VERSION, **settings, **hashes}


def _without_effect(config: ConvertConfig) -> set[str]:
    """Return the keys of settings for features that are not used."""
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
    """Refuse an output inside the input, whose songs the next run would convert, or a dataset.

    Raises: UserError: when it is one.
    """
    here = folder.resolve()
    if source.is_dir() and here.is_relative_to(source.resolve()):
        raise UserError(f"{folder} is inside the input folder {source}; name another folder")
    if (folder / "dataset.json").exists():
        raise UserError(f"{folder} is a dataset; name another folder for the converted songs")


def _differs(now: ListedSong, then: PlannedSong) -> bool:
    return (now.size, now.mtime_ns, now.path) != (then.size, then.mtime_ns, then.path)


def _gone(corpus: Corpus, tasks: Mapping[int, Task]) -> frozenset[str]:
    planned = {task.songs[0].song_id for task in tasks.values()}
    return frozenset(planned - {source.song_id for source in corpus.songs})


def _sweep_songs(outputs: Iterable[Path]) -> None:
    """Remove the half-written files of killed workers from the folders of `outputs`."""
    for folder in {path.parent for path in outputs}:
        for path in folder.glob(".*"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink(missing_ok=True)
