"""The main job: a corpus becomes a dataset of shards, resumable at any point.

lock -> same settings? -> list -> plan -> what is missing -> run -> balance
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.environment import mixed, threads_before
from pipeline.cluster.run_tasks import Work, run_tasks
from pipeline.dataset.account import Account, balance_dataset
from pipeline.dataset.schema import SCHEMA_VERSION
from pipeline.dataset.shards import (
    Footer,
    has_xvectors,
    iter_shards,
    read_dataset_info,
    read_footers,
    require_current,
    units_in_words,
    write_dataset_info,
)
from pipeline.errors import UserError, first_names
from pipeline.extract.config import ExtractConfig, fingerprinted
from pipeline.extract.from_dataset import FromDataset, compare, read_source
from pipeline.extract.job import ExtractJob, TakenOver
from pipeline.extract.model_checks import check_codebooks, check_models
from pipeline.extract.plan_changes import Asked, Changes, find_changes
from pipeline.extract.workload import extraction
from pipeline.fingerprint import differences, fingerprint, neutral_values
from pipeline.songs.corpus import Corpus, list_corpus
from pipeline.songs.plan import (
    Task,
    append_plan,
    default_task_minutes,
    load_plan,
    make_tasks,
    plan_files,
    plan_songs,
)
from pipeline.storage.atomic import commit_file, sweep
from pipeline.storage.lock import lock
from pipeline.storage.weight_files import WeightFile, read_weights


@dataclass(frozen=True)
class ExtractOptions:
    """How to run, as opposed to what to make (that is ExtractConfig)."""

    speaker: str | None = None
    ray_address: str | None = None
    local: bool = False  # in this process, one task after the other, without Ray
    dry_run: bool = False
    force_new: bool = False
    retry_quarantined: bool = False
    redo_changed: bool = False


@dataclass
class ExtractOutcome:
    """What a run found and did, for the summary."""

    account: Account = field(default_factory=Account)
    work: Work = field(default_factory=Work)
    notices: list[str] = field(default_factory=list)


def extract(
    corpus_path: Path,
    dataset: Path,
    config: ExtractConfig,
    options: ExtractOptions,
    console: Console,
) -> ExtractOutcome:
    """Make or complete `dataset` from the corpus.

    Raises: UserError (settings, corpus, cluster), StorageFault, SongBug; all leave what was
    committed intact, and the same command goes on from there.
    """
    check_models(config, options.local)
    weights = read_weights(config.weight_paths)
    check_codebooks(config, weights)
    settings = fingerprinted(config, weights)
    corpus = FromCorpus(corpus_path, config, options, console)
    return _make(dataset.absolute(), config, settings, weights, corpus, options, console)


def reextract(
    source: Path,
    dataset: Path,
    config: ExtractConfig,
    options: ExtractOptions,
    console: Console,
) -> ExtractOutcome:
    """Make or complete `dataset` from the shards of the dataset `source`, as `extract` does.

    config: of `reextract.config_from`. Columns that it would make as they are, are taken over.
    """
    if source.resolve() == dataset.resolve():
        raise UserError(f"{dataset} cannot be made from itself; name a new folder")
    reading = compare(read_source(source), config)
    check_models(config, options.local, reading.taken)
    check_codebooks(config, reading.weights, reading.taken)
    shards = FromDataset(reading)
    return _make(
        dataset.absolute(), config, reading.settings, reading.to_load, shards, options, console
    )


def _make(
    dataset: Path,
    config: ExtractConfig,
    settings: dict[str, Any],
    weights: dict[str, WeightFile],
    material: FromCorpus | FromDataset,
    options: ExtractOptions,
    console: Console,
) -> ExtractOutcome:
    source = material.root if isinstance(material, FromDataset) else None
    if options.dry_run:
        _dry_run(dataset, settings, material, options, console)
        return ExtractOutcome()
    with lock(dataset):
        if options.force_new:
            _remove_dataset(dataset)
        settings = _check_settings(dataset, settings)
        wanted = fingerprint(settings)
        material.look()
        sweep(dataset)
        if not plan_files(dataset):
            _write_info(dataset, config, settings, {}, source)
        outcome = ExtractOutcome()
        tasks, held = _examine(dataset, wanted, outcome)
        asked = material.ask(tasks, held)
        outcome.notices += asked.notices
        if asked.tasks:
            append_plan(dataset, asked.tasks)
            tasks = load_plan(dataset)
        held = _still_held(tasks, held, asked)
        missing = {index: task for index, task in tasks.items() if index not in held}
        if missing:
            hours = sum(task.duration_s for task in missing.values()) / 3600
            console.print(
                f"{len(missing)} of {len(tasks)} tasks to do, {hours:.2f} h of audio",
                highlight=False,
            )
            job = ExtractJob(
                dataset,
                material.root,
                config,
                wanted,
                weights,
                asked.gone,
                threads_before((f.environment for f in held.values()), config.workers),
                material.take_over(),
            )
            outcome.work = run_tasks(
                extraction(job), missing, options.ray_address, options.local, console
            )
            outcome.notices += outcome.work.notices
        outcome.account, environments = _read_back(dataset, tasks)
        outcome.notices += mixed("shards of one dataset", environments)
        if tasks:  # of a run that did nothing too: one before it may have ended just short of this
            _write_info(dataset, config, settings, tasks, source)
            _write_card(dataset, outcome.account)
        return outcome


class FromCorpus:
    """What the songs of a corpus ask of the plan."""

    def __init__(
        self, path: Path, config: ExtractConfig, options: ExtractOptions, console: Console
    ) -> None:
        self.path = path
        self.config = config
        self.options = options
        self.console = console

    def look(self) -> None:
        """List the corpus. Raises: UserError when there is none."""
        self.corpus = list_corpus(self.path, self.options.speaker)

    @property
    def root(self) -> Path:
        return self.corpus.root

    def ask(self, tasks: dict[int, Task], held: dict[int, Footer]) -> Asked:
        corpus, options = self.corpus, self.options
        changes = find_changes(corpus, tasks, held, options.retry_quarantined, options.redo_changed)
        new = _plan_changes(corpus, tasks, changes, self.config, self.console)
        speakers = Counter(source.speaker for source in corpus.songs)
        lines = [f"corpus   {len(corpus.songs)} songs of {len(speakers)} speakers at {corpus.root}"]
        unreadable = [s.song_id for task in new for s in task.songs if s.duration_s == 0]
        if unreadable:
            lines.append(
                f"trouble  {len(unreadable)} without a readable header ({first_names(unreadable)})"
            )
        return Asked(new, changes.gone, changes.notices, lines)

    def take_over(self) -> TakenOver | None:
        return None


def _still_held(tasks: dict[int, Task], held: dict[int, Footer], asked: Asked) -> dict[int, Footer]:
    """Of the committed shards those that are what is asked for now."""
    return {
        index: footer
        for index, footer in held.items()
        if footer.task_id == tasks[index].task_id and index not in asked.stale
    }


def _read_back(dataset: Path, tasks: dict[int, Task]) -> tuple[Account, list[dict[str, str]]]:
    """Balance of everything committed, and the conditions it was made under.

    Shards that cannot be read are among the problems.
    """
    import pyarrow.parquet as pq

    footers, unreadable = [], []
    environments: list[dict[str, str]] = []
    for path, footer in read_footers(iter_shards(dataset)):
        if isinstance(footer, Footer):
            footers.append((footer, pq.read_metadata(path).num_rows))
            if footer.environment not in environments:
                environments.append(footer.environment)
        else:
            unreadable.append(str(footer))
    account = balance_dataset(list(tasks.values()), footers)
    account.problems += unreadable
    return account, environments


def _remove_dataset(dataset: Path) -> None:
    """Delete what this program made, and nothing else that may lie there."""
    if not (dataset / "dataset.json").exists():
        return
    read_dataset_info(dataset)
    for name in ("data", "plan", ".tmp"):
        if (dataset / name).exists():
            shutil.rmtree(dataset / name)
    # The last one says: this is ours.
    for name in ("README.md", "report.html", "purity.parquet", "dataset.json"):
        (dataset / name).unlink(missing_ok=True)


def _check_settings(dataset: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings to go on with: the recorded ones, whose fingerprint the shards carry.

    Raises: UserError: when the dataset was made with others.
    """
    if not (dataset / "dataset.json").exists():
        if (dataset / "data").exists() or (dataset / "plan").exists():
            raise UserError(f"{dataset} holds data/ or plan/ but no dataset.json: not touched")
        return settings
    info = read_dataset_info(dataset)
    if not plan_files(dataset):  # nothing was made with the recorded settings
        return settings
    require_current(dataset, info)
    recorded: dict[str, Any] = info["settings"]
    differing = differences(recorded, settings, neutral_values(ExtractConfig))
    if differing:
        raise UserError(
            f"{dataset} was made with other settings ({'; '.join(differing)}); choose a new "
            "dataset folder, or pass --force-new to delete this one and start over"
        )
    return recorded


def _examine(
    dataset: Path, wanted: str, outcome: ExtractOutcome
) -> tuple[dict[int, Task], dict[int, Footer]]:
    """The plan, and the footers of the shards that are what it asks for.

    wanted: the fingerprint. A shard that is damaged or made with other settings is done again.
    """
    tasks = load_plan(dataset)
    held = {}
    for path, footer in read_footers(iter_shards(dataset)):
        if isinstance(footer, UserError):
            outcome.notices.append(f"{footer}; its task is done again")
        elif footer.task not in tasks or tasks[footer.task].shard_name != path.name:
            raise UserError(f"{path} belongs to no task of the plan; move it out of the dataset")
        elif footer.fingerprint != wanted:
            outcome.notices.append(f"{path} was made with other settings; its task is done again")
        elif footer.task_id == tasks[footer.task].task_id:
            held[footer.task] = footer
    return tasks, held


def _plan_changes(
    corpus: Corpus,
    tasks: dict[int, Task],
    changes: Changes,
    config: ExtractConfig,
    console: Console,
) -> list[Task]:
    """The tasks that the changes make: renewed ones under their old index, and new ones."""
    wanted = changes.songs
    if not wanted:
        return []
    console.print(f"planning {len(wanted)} songs", highlight=False)
    sources = [source for source in corpus.songs if source.song_id in wanted]
    songs = plan_songs(corpus, sources, config.decode, config.workers.scratch)
    renewed = [
        Task(index, tasks[index].split, tuple(songs.get(s.song_id, ("", s))[1] for s in kept))
        for index, kept in changes.renew.items()
    ]
    added = [songs[source.song_id] for source in changes.add]
    before = sum(task.duration_s for task in tasks.values())
    minutes = (before + sum(song.duration_s for _, song in added)) / 60
    size = config.plan.task_minutes or default_task_minutes(minutes)
    return renewed + make_tasks(added, size, max(tasks, default=-1) + 1)


def _dry_run(
    dataset: Path,
    settings: dict[str, Any],
    material: FromCorpus | FromDataset,
    options: ExtractOptions,
    console: Console,
) -> None:
    """List and plan, write nothing."""
    material.look()
    outcome = ExtractOutcome()
    tasks: dict[int, Task] = {}
    held: dict[int, Footer] = {}
    if not options.force_new:
        settings = _check_settings(dataset, settings)
        tasks, held = _examine(dataset, fingerprint(settings), outcome)
    asked = material.ask(tasks, held)
    after = tasks | {task.index: task for task in asked.tasks}
    done = _still_held(after, held, asked)
    hours = sum(task.duration_s for index, task in after.items() if index not in done) / 3600
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for line in asked.lines:
        say(line)
    say(f"plan     {len(after)} tasks, {len(done)} of them done")
    for notice in outcome.notices + asked.notices:
        say(f"note     {notice}")
    say(f"to do    {len(after) - len(done)} tasks, {hours:.2f} h; nothing was written (--dry-run)")


def _write_info(
    dataset: Path,
    config: ExtractConfig,
    settings: dict[str, Any],
    tasks: dict[int, Task],
    source: Path | None,
) -> None:
    """dataset.json, for people and for programs that want to know before they read a shard.

    source: the dataset whose audio is taken over.
    """
    before = read_dataset_info(dataset) if (dataset / "dataset.json").exists() else {}
    info = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "config": dataclasses.asdict(config),
        "speakers": sorted({song.speaker for task in tasks.values() for song in task.songs}),
        "encoders": [cfg.name for cfg in config.all_encoders.values()],
        "f0_method": config.f0.method,
        "sample_rate": config.audio.sample_rate,
        "hop_length": config.f0.hop_length,
        "source": None if source is None else source.name,
        "card_sha256": before.get("card_sha256"),
    }
    _update_info(dataset, before, info)


def _update_info(dataset: Path, before: dict[str, Any], info: dict[str, Any]) -> None:
    if json.loads(json.dumps(info)) != before:
        write_dataset_info(dataset, info)


def _write_card(dataset: Path, account: Account) -> None:
    """README.md: a dataset card for the Hugging Face hub. Edited by hand, it is left alone."""
    info = read_dataset_info(dataset)
    splits = sorted({path.name.rpartition("-")[0] for path in iter_shards(dataset)})
    files = "\n".join(f"  - split: {s}\n    path: data/{s}-*.parquet" for s in splits)
    source = f", on the audio of `{info['source']}`" if info.get("source") else ""
    vectors = " Each clip has an x-vector." if has_xvectors(info) else ""
    text = f"""---
license: other
task_categories: [audio-to-audio]
tags: [singing, singing-voice-conversion]
configs:
- config_name: default
  data_files:
{files}
---

# {dataset.name}

{account.clips} clips, {account.hours_kept:.3f} h, from {account.count("kept")} songs of
{len(info["speakers"])} speakers, made with Cantor{source}.
Audio is mono FLAC at {info["sample_rate"]} Hz,
f0 by {info["f0_method"]} every {info["hop_length"]} samples, units by
{", ".join(units_in_words(info))}.{vectors}
The settings are in `dataset.json`, the account of every source song in each shard's footer.

```python
from datasets import Audio, load_dataset

clips = load_dataset(".", split="{splits[0]}")
clips = clips.cast_column("audio", Audio(decode=False))  # FLAC bytes; decoding needs torchcodec
```

The licence is that of the songs: state it here before you share this.
"""
    digest = hashlib.sha256(text.encode()).hexdigest()
    card = dataset / "README.md"
    there = hashlib.sha256(card.read_bytes()).hexdigest() if card.exists() else None
    if there not in (None, digest, info["card_sha256"]):
        return
    if there != digest:
        commit_file(dataset, "README.md", lambda file: file.write(text.encode()))
    _update_info(dataset, info, info | {"card_sha256": digest})
