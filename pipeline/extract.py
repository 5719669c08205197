"""The main job: a corpus becomes a dataset of shards, resumable at any point.

lock -> same settings? -> list -> plan -> what is missing -> run -> balance -> summary
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import SCHEMA_VERSION, ExtractConfig, fingerprint, fingerprinted
from pipeline.corpus import Corpus, Source, list_corpus
from pipeline.errors import SongBug, StorageFault, UserError
from pipeline.ledger import QUARANTINED, Account, take_account
from pipeline.plan import (
    PlannedSong,
    Task,
    append_plan,
    default_task_minutes,
    load_plan,
    make_tasks,
)
from pipeline.progress import Board, ProgressDisplay, Snapshot
from pipeline.shards import (
    Footer,
    commit_file,
    iter_shards,
    read_dataset_info,
    read_footers,
    write_dataset_info,
)
from pipeline.workers import BUG, COMMITTED, STORAGE, Job, TaskResult
from stages.errors import BadInput

_LOCK_WAIT_S = 5.0
_STORAGE_RETRIES = 3
_ROUNDS_WITHOUT_PROGRESS = 3


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
class Outcome:
    """What a run did, for the summary."""

    account: Account
    tasks_run: int = 0
    wall_s: float = 0.0
    start_up_s: float = 0.0
    audio_s: float = 0.0  # of the songs this run worked on
    stage_s: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def extract(
    corpus_path: Path,
    dataset: Path,
    config: ExtractConfig,
    options: ExtractOptions,
    console: Console,
) -> Outcome:
    """Make or complete `dataset` from the corpus.

    Raises: UserError (settings, corpus, cluster), StorageFault, SongBug; all leave what was
    committed intact, and the same command goes on from there.
    """
    dataset = dataset.absolute()
    settings = fingerprinted(config)
    if options.dry_run:
        return _dry_run(corpus_path, dataset, config, options, console)
    with lock(dataset):
        if options.force_new:
            _remove_dataset(dataset)
        _check_settings(dataset, settings)
        corpus = list_corpus(corpus_path, options.speaker)
        _sweep(dataset)
        if not (dataset / "dataset.json").exists():
            write_dataset_info(dataset, _dataset_info(config, settings, corpus))
        outcome = Outcome(Account())
        tasks, footers = _update_plan(dataset, corpus, config, options, outcome, console)
        missing = {index: task for index, task in tasks.items() if index not in footers}
        outcome.notices += _mixed_environment(footers, config)
        if missing:
            hours = sum(task.duration_s for task in missing.values()) / 3600
            console.print(
                f"{len(missing)} of {len(tasks)} tasks to do, {hours:.2f} h of audio",
                highlight=False,
            )
            job = Job(
                dataset, corpus.root, config, fingerprint(settings), _checkpoint_hashes(settings)
            )
            _run(job, missing, options, outcome, console)
        outcome.account = read_account(dataset, tasks)
        write_dataset_info(dataset, _dataset_info(config, settings, corpus))
        _write_card(dataset, outcome.account)
        return outcome


def read_account(dataset: Path, tasks: dict[int, Task]) -> Account:
    """Balance of everything committed; shards that cannot be read are among the problems."""
    import pyarrow.parquet as pq

    footers, unreadable = [], []
    for path, footer in read_footers(iter_shards(dataset)):
        if isinstance(footer, Footer):
            footers.append((footer, pq.read_metadata(path).num_rows))
        else:
            unreadable.append(str(footer))
    account = take_account(list(tasks.values()), footers)
    account.problems += unreadable
    return account


@contextmanager
def lock(dataset: Path) -> Iterator[None]:
    """Hold DATASET/.lock. A run that died held no lock: the system releases it.

    Raises: UserError when another run has it for some seconds.
    """
    dataset.mkdir(parents=True, exist_ok=True)
    with (dataset / ".lock").open("a+") as file:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    who = file.read().strip() or "another process"
                    raise UserError(
                        f"{dataset} is in use by {who}; wait for it to end or stop it"
                    ) from error
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _remove_dataset(dataset: Path) -> None:
    """Delete what this program made, and nothing else that may lie there."""
    if not (dataset / "dataset.json").exists():
        return
    read_dataset_info(dataset)
    for name in ("data", "plan", ".tmp"):
        shutil.rmtree(dataset / name, ignore_errors=True)
    for name in ("dataset.json", "README.md", "report.html"):
        (dataset / name).unlink(missing_ok=True)


def _check_settings(dataset: Path, settings: dict[str, Any]) -> None:
    if not (dataset / "dataset.json").exists():
        if (dataset / "data").exists() or (dataset / "plan").exists():
            raise UserError(f"{dataset} holds data/ or plan/ but no dataset.json: not touched")
        return
    before = read_dataset_info(dataset)["settings"]
    if before == settings:
        return
    keys = sorted(set(before) | set(settings))
    changes = [
        f"{key} was {before.get(key)!r}, is {settings.get(key)!r}"
        for key in keys
        if before.get(key) != settings.get(key)
    ]
    raise UserError(
        f"{dataset} was made with other settings ({'; '.join(changes)}); choose a new dataset "
        "folder, or pass --force-new to delete this one and start over"
    )


def _sweep(dataset: Path) -> None:
    """Remove what killed workers left half-written."""
    if (dataset / ".tmp").is_dir():
        for path in (dataset / ".tmp").iterdir():
            path.unlink(missing_ok=True)


def _update_plan(
    dataset: Path,
    corpus: Corpus,
    config: ExtractConfig,
    options: ExtractOptions,
    outcome: Outcome,
    console: Console,
) -> tuple[dict[int, Task], dict[int, Footer]]:
    """Plan new songs, redo or report changed ones; the plan and the footers that still hold."""
    tasks = load_plan(dataset)
    footers = _committed(dataset, tasks, outcome)
    replan, fresh = _differences(corpus, tasks, footers, options, outcome)
    if options.retry_quarantined:
        fresh += _quarantined_sources(corpus, footers)
    if fresh or replan:
        console.print(
            f"planning {len(fresh) + sum(len(t.songs) for t in replan)} songs", highlight=False
        )
        wanted = {source.song_id: source for source in fresh}
        stale = {song.song_id for task in replan for song in task.songs}
        wanted |= {source.song_id: source for source in corpus.songs if source.song_id in stale}
        songs = plan_songs(corpus, list(wanted.values()), config)
        renewed = [
            dataclasses.replace(
                task, songs=tuple(songs.get(song.song_id, ("", song))[1] for song in task.songs)
            )
            for task in replan
        ]
        pairs = [songs[source.song_id] for source in fresh]
        minutes = config.plan.task_minutes or default_task_minutes(
            sum(song.duration_s for _, song in songs.values()) / 60
            + sum(task.duration_s for task in tasks.values()) / 60
        )
        first = max(tasks, default=-1) + 1
        append_plan(dataset, renewed + (make_tasks(pairs, minutes, first) if pairs else []))
        tasks = load_plan(dataset)
    held = {
        index: footer for index, footer in footers.items() if footer.task_id == tasks[index].task_id
    }
    return tasks, held


def _committed(dataset: Path, tasks: dict[int, Task], outcome: Outcome) -> dict[int, Footer]:
    """Footers of the shards that belong to the plan. A damaged shard is redone, and said so."""
    footers = {}
    for path, footer in read_footers(iter_shards(dataset)):
        if isinstance(footer, UserError):
            outcome.notices.append(f"{footer}; its task is done again")
        elif footer.task in tasks and tasks[footer.task].shard_name == path.name:
            footers[footer.task] = footer
        else:
            raise UserError(f"{path} belongs to no task of the plan; move it out of the dataset")
    return footers


def _differences(
    corpus: Corpus,
    tasks: dict[int, Task],
    footers: dict[int, Footer],
    options: ExtractOptions,
    outcome: Outcome,
) -> tuple[list[Task], list[Source]]:
    """Tasks to be planned again because songs changed, and songs that are new."""
    listed = {source.song_id: source for source in corpus.songs}
    task_of: dict[str, Task] = {}
    planned: dict[str, PlannedSong] = {}
    for task in tasks.values():
        for song in task.songs:
            task_of[song.song_id], planned[song.song_id] = task, song
    changed = [
        song_id
        for song_id, song in planned.items()
        if (now := listed.get(song_id)) is not None
        and (now.size, now.mtime_ns, now.speaker) != (song.size, song.mtime_ns, song.speaker)
    ]
    done = [song_id for song_id in changed if task_of[song_id].index in footers]
    if done and not options.redo_changed:
        outcome.notices.append(
            f"{len(done)} songs changed after they were extracted ({_some(done)}); "
            "--redo-changed does their tasks again"
        )
    gone = sorted(set(planned) - set(listed))
    if gone:
        outcome.notices.append(
            f"{len(gone)} planned songs are no longer in the corpus ({_some(gone)})"
        )
    again = changed if options.redo_changed else [name for name in changed if name not in done]
    replan = {task_of[song_id].index: task_of[song_id] for song_id in again}
    fresh = [source for song_id, source in listed.items() if song_id not in planned]
    if corpus.ignored:
        kinds = ", ".join(f"{suffix} {n}" for suffix, n in corpus.ignored.most_common(6))
        outcome.notices.append(f"files that are not audio by name were left alone: {kinds}")
    if corpus.loops:
        outcome.notices.append(f"links that lead back up were not followed: {_some(corpus.loops)}")
    return list(replan.values()), fresh


def _quarantined_sources(corpus: Corpus, footers: dict[int, Footer]) -> list[Source]:
    latest: dict[str, str] = {}
    for _, footer in sorted(footers.items()):
        latest |= {entry.song_id: entry.status for entry in footer.ledger}
    return [source for source in corpus.songs if latest.get(source.song_id) == QUARANTINED]


def plan_songs(
    corpus: Corpus, sources: Sequence[Source], config: ExtractConfig
) -> dict[str, tuple[str, PlannedSong]]:
    """(split, song) by song_id, durations read from the headers in a limited child process.

    A header that cannot be read gives 0 s: the song is planned, and quarantined when it is decoded.
    """
    from pipeline.workers import Scratch
    from stages.decode import Decoder

    scratch = Scratch(config.workers.scratch)
    songs = {}
    try:
        with Decoder(config.decode, scratch.folder) as decoder:
            root = os.fsencode(corpus.root)
            paths = (os.path.join(root, source.path) for source in sources)
            headers = decoder.probe_many(paths)
            for source, header in zip(sources, headers, strict=True):
                duration_s = 0.0 if isinstance(header, BadInput) else header.duration_s
                song = PlannedSong(
                    source.song_id,
                    source.speaker,
                    source.path,
                    source.size,
                    source.mtime_ns,
                    duration_s,
                )
                songs[source.song_id] = (source.split, song)
    finally:
        scratch.close()
    return songs


def _dry_run(
    corpus_path: Path,
    dataset: Path,
    config: ExtractConfig,
    options: ExtractOptions,
    console: Console,
) -> Outcome:
    """List and plan, write nothing."""
    if not options.force_new:
        _check_settings(dataset, fingerprinted(config))
    corpus = list_corpus(corpus_path, options.speaker)
    outcome = Outcome(Account())
    tasks = {} if options.force_new else load_plan(dataset)
    footers = {} if options.force_new else _committed(dataset, tasks, outcome)
    replan, fresh = _differences(corpus, tasks, footers, options, outcome)
    if options.retry_quarantined:
        fresh += _quarantined_sources(corpus, footers)
    songs = plan_songs(corpus, fresh, config)
    minutes = sum(song.duration_s for _, song in songs.values()) / 60
    before = sum(task.duration_s for task in tasks.values()) / 60
    size = config.plan.task_minutes or default_task_minutes(minutes + before)
    new = make_tasks(songs.values(), size, max(tasks, default=-1) + 1) if songs else []
    redo = {task.index for task in replan}
    waiting = [t for t in tasks.values() if t.index not in footers or t.index in redo] + new
    unreadable = [song.song_id for _, song in songs.values() if song.duration_s == 0]
    speakers = Counter(source.speaker for source in corpus.songs)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"corpus   {len(corpus.songs)} songs of {len(speakers)} speakers at {corpus.root}")
    if songs:
        say(f"new      {len(songs)} songs, {minutes / 60:.2f} h by their headers")
    if unreadable:
        say(f"trouble  {len(unreadable)} without a readable header ({_some(unreadable)})")
    say(f"plan     {len(tasks) + len(new)} tasks of about {size:.1f} minutes, {len(footers)} done")
    hours = sum(task.duration_s for task in waiting) / 3600
    say(f"to do    {len(waiting)} tasks, {hours:.2f} h; nothing was written (--dry-run)")
    return outcome


def _run(
    job: Job,
    missing: dict[int, Task],
    options: ExtractOptions,
    outcome: Outcome,
    console: Console,
) -> None:
    """Do the missing tasks; results in `outcome`."""
    started = time.monotonic()
    stage_s: dict[str, float] = defaultdict(float)
    outcome.audio_s = sum(task.duration_s for task in missing.values())
    session = _local_session if options.local else functools.partial(_ray_session, options)
    with session(job, missing, outcome) as (run_round, snapshot, find_killers):
        outcome.start_up_s = time.monotonic() - started
        with ProgressDisplay(console, outcome.audio_s, snapshot):
            _run_rounds(missing, run_round, find_killers, stage_s, outcome)
    outcome.stage_s = dict(stage_s)
    outcome.wall_s = time.monotonic() - started


RunRound = Callable[[dict[int, Task], dict[int, set[str]]], Iterator[TaskResult]]
FindKillers = Callable[[Task], set[str]]


def _run_rounds(
    missing: dict[int, Task],
    run_round: RunRound,
    find_killers: FindKillers,
    stage_s: dict[str, float],
    outcome: Outcome,
) -> None:
    """Run until every task is committed.

    A task that the storage failed is tried again; one whose worker kept dying is looked at song by
    song, and what kills its worker alone is quarantined.
    """
    waiting = dict(missing)
    crashed: dict[int, set[str]] = defaultdict(set)
    failures: Counter[int] = Counter()
    idle_rounds = 0
    while waiting:
        reported = set()
        before = len(waiting)
        for result in run_round(dict(waiting), crashed):
            reported.add(result.task)
            if result.status == BUG:
                raise SongBug(result.detail)
            if result.status == STORAGE:
                failures[result.task] += 1
                if result.disk_full or failures[result.task] > _STORAGE_RETRIES:
                    raise StorageFault(result.detail)
            elif result.status == COMMITTED and waiting.pop(result.task, None) is not None:
                outcome.tasks_run += 1
                for stage, seconds in result.stage_s.items():
                    stage_s[stage] += seconds
        for index in sorted(set(waiting) - reported):
            outcome.notices.append(f"task {index}: workers died on it; its songs were tried alone")
            killers = find_killers(waiting[index])
            crashed[index] |= killers
            if killers:
                outcome.notices.append(f"workers died on {_some(sorted(killers))}: quarantined")
        idle_rounds = idle_rounds + 1 if len(waiting) == before else 0
        if idle_rounds >= _ROUNDS_WITHOUT_PROGRESS:
            raise StorageFault(
                f"the workers of tasks {_some([str(i) for i in sorted(waiting)])} die each time, "
                "though every song alone passes; too little memory for that many workers? Lower "
                "workers.max_workers and run the same command again"
            )


@contextmanager
def _local_session(
    job: Job, missing: dict[int, Task], outcome: Outcome
) -> Iterator[tuple[RunRound, Callable[[], Snapshot | None], FindKillers]]:
    import pyarrow as pa

    from pipeline.workers import ExtractTask, read_result, task_row

    board = Board()
    worker = ExtractTask(job, board.song_done)

    def run_round(tasks: dict[int, Task], crashed: dict[int, set[str]]) -> Iterator[TaskResult]:
        for index in tasks:
            row = pa.Table.from_pylist([task_row(index, crashed.get(index, ()))])
            yield read_result(worker(row))

    try:
        yield run_round, board.snapshot, lambda task: set()
    finally:
        worker.close()


@contextmanager
def _ray_session(
    options: ExtractOptions, job: Job, missing: dict[int, Task], outcome: Outcome
) -> Iterator[tuple[RunRound, Callable[[], Snapshot | None], FindKillers]]:
    import ray

    from pipeline import dag

    with dag.connected(options.ray_address, job.config):
        nodes = [node["Resources"] for node in dag.living_nodes()]
        pools = dag.plan_pools(nodes, missing, job.config)
        dag.check_nodes(job.dataset, job.corpus)
        board = dag.start_board()

        def snapshot() -> Snapshot | None:
            try:
                return ray.get(board.snapshot.remote(), timeout=5)  # type: ignore[no-any-return]
            except ray.exceptions.RayError:
                return None

        yield (
            lambda tasks, crashed: dag.run_graph(job, tasks, crashed, pools, board),
            snapshot,
            lambda task: dag.find_killers(job, task, pools.worker_memory),
        )


def _checkpoint_hashes(settings: dict[str, Any]) -> tuple[str | None, ...]:
    return (settings.get("encoder.checkpoint_sha256"),)


def _mixed_environment(footers: dict[int, Footer], config: ExtractConfig) -> list[str]:
    """A word of warning when a run resumes what other libraries or machines began."""
    from pipeline.workers import environment, threads_of

    here = environment(threads_of(config))
    differing = {
        key: sorted({footer.environment.get(key, "?"), value})
        for footer in footers.values()
        for key, value in here.items()
        if footer.environment.get(key) != value
    }
    if not differing:
        return []
    words = "; ".join(f"{key} {' and '.join(values)}" for key, values in differing.items())
    return [f"shards of one dataset made under different conditions may differ in bits: {words}"]


def _dataset_info(
    config: ExtractConfig, settings: dict[str, Any], corpus: Corpus
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "config": dataclasses.asdict(config),
        "speakers": sorted({source.speaker for source in corpus.songs}),
        "encoders": [cfg.name for cfg in config.encoders],
        "f0_method": config.f0.method,
        "sample_rate": config.audio.sample_rate,
        "hop_length": config.f0.hop_length,
    }


def _write_card(dataset: Path, account: Account) -> None:
    """README.md: a dataset card for the Hugging Face hub."""
    info = read_dataset_info(dataset)
    splits = sorted({path.name.rpartition("-")[0] for path in iter_shards(dataset)})
    files = "\n".join(f"  - split: {s}\n    path: data/{s}-*.parquet" for s in splits)
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
{len(info["speakers"])} speakers, made with Cantor. Audio is mono FLAC at {info["sample_rate"]} Hz,
f0 by {info["f0_method"]} every {info["hop_length"]} samples, units by
{", ".join(info["encoders"])}.
The settings are in `dataset.json`, the account of every source song in each shard's footer.

```python
from datasets import Audio, load_dataset

clips = load_dataset("parquet", data_files="data/*.parquet", split="train")
clips = clips.cast_column("audio", Audio(decode=False))  # FLAC bytes; decoding needs torchcodec
```

The licence is that of the songs: state it here before you share this.
"""
    commit_file(dataset, "README.md", lambda file: file.write(text.encode()))


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def summary(outcome: Outcome) -> dict[str, Any]:
    """The numbers of the closing table, as `--json` writes them."""
    account = outcome.account
    total_s = sum(outcome.stage_s.values())
    work_s = max(1e-9, outcome.wall_s - outcome.start_up_s)
    return {
        "songs": account.planned,
        "kept": account.count("kept"),
        "filtered": dict(account.reasons("filtered")),
        "quarantined": dict(account.reasons("quarantined")),
        "hours_in": account.hours_in,
        "hours_kept": account.hours_kept,
        "dropped_s": account.dropped_s(),
        "clips": account.clips,
        "shards": account.shards,
        "tasks_run": outcome.tasks_run,
        "wall_s": outcome.wall_s,
        "start_up_s": outcome.start_up_s,
        "times_real_time": outcome.audio_s / work_s if outcome.tasks_run else None,
        "stage_share": {k: v / total_s for k, v in outcome.stage_s.items()} if total_s else {},
        "duplicates": account.duplicates(),
        "notices": outcome.notices,
        "problems": account.problems,
    }


def write_summary(path: Path, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary(outcome), indent=2, ensure_ascii=False) + "\n")
