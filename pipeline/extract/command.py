"""The main job: a corpus becomes a dataset of shards, resumable at any point."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.environment import mixed, threads_before
from pipeline.cluster.resumable_run import TaskOutcome, TaskPlan, complete, preview, with_added
from pipeline.cluster.run_tasks import Work, run_tasks
from pipeline.dataset.account import Account, balance_dataset
from pipeline.dataset.shards import (
    Footer,
    iter_shards,
    note_on_trial_units,
    read_dataset_info,
    read_footers,
    require_supported,
    require_whole,
)
from pipeline.errors import UserError, printable
from pipeline.extract.config import ExtractConfig, fingerprinted
from pipeline.extract.dataset_card import write_card, write_dataset_json
from pipeline.extract.from_corpus import FromCorpus
from pipeline.extract.from_dataset import FromDataset, compare, read_source
from pipeline.extract.job import ExtractJob
from pipeline.extract.model_checks import check_codebooks, check_models
from pipeline.extract.workload import extraction
from pipeline.fingerprint import differences, fingerprint, neutral_values
from pipeline.songs.plan import Task, append_plan, load_plan, plan_files
from pipeline.storage.weight_files import WeightFile, read_weights

ExtractOutcome = TaskOutcome[Account]


@dataclass(frozen=True)
class ExtractOptions:
    """Options that change how a run works, not its output (that is ExtractConfig)."""

    speaker: str | None = None
    ray_address: str | None = None
    local: bool = False  # in this process, one task after the other, without Ray
    dry_run: bool = False
    force_new: bool = False
    retry_quarantined: bool = False
    redo_changed: bool = False


def extract(
    corpus: Path,
    dataset: Path,
    config: ExtractConfig,
    options: ExtractOptions,
    console: Console,
) -> ExtractOutcome:
    """Make or complete `dataset` from a corpus. Committed shards stay, whatever happens later.

    Raises: UserError: when settings, corpus or cluster are wrong; StorageFault: when the disk or
    the cluster fails; SongBug: when our code fails on a song.
    """
    check_models(config, options.local)
    weights = read_weights(config.weight_paths)
    check_codebooks(config, weights)
    source = FromCorpus(
        corpus,
        config,
        console,
        options.speaker,
        options.retry_quarantined,
        options.redo_changed,
    )
    settings = fingerprinted(config, weights)
    return _run(Extraction(dataset.absolute(), config, settings, weights, source, options, console))


def reextract(
    source: Path,
    dataset: Path,
    config: ExtractConfig,
    options: ExtractOptions,
    console: Console,
) -> ExtractOutcome:
    """Make or complete `dataset` from the shards of the dataset `source`.

    config: from `from_dataset.config_from`. Columns that would come out the same are taken over.

    Raises: UserError: when settings, source or cluster are wrong; StorageFault: when the disk or
    the cluster fails; SongBug: when our code fails on a song.
    """
    if source.resolve() == dataset.resolve():
        raise UserError(f"{dataset} cannot be made from itself; name a new folder")
    reading = compare(read_source(source), config)
    check_models(config, options.local, reading.taken)
    check_codebooks(config, reading.weights, reading.taken)
    return _run(
        Extraction(
            dataset.absolute(),
            config,
            reading.settings,
            reading.to_load,
            FromDataset(reading),
            options,
            console,
        )
    )


def _run(extraction: Extraction) -> ExtractOutcome:
    if not extraction.options.dry_run:
        return complete(extraction)
    extraction.describe(preview(extraction))
    return TaskOutcome(Account(), Work(), [])


@dataclass
class Extraction:
    """The steps of an extraction, as `complete` calls them.

    settings: those that change the output. weights: files that have to be loaded.
    lines: a description of the source, for --dry-run.
    """

    folder: Path
    config: ExtractConfig
    settings: dict[str, Any]
    weights: dict[str, WeightFile]
    source: FromCorpus | FromDataset
    options: ExtractOptions
    console: Console
    work: Work = field(default_factory=Work)
    notices: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def list_inputs(self) -> None:
        self.source.list_songs()
        note = note_on_trial_units(each.name for each in self.config.all_encoders.values())
        if note is not None:
            self.console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)

    def check_settings(self) -> None:
        """Refuse other settings than the recorded ones; else go on with those.

        Shards carry the fingerprint of the recorded ones.
        """
        if not (self.folder / "dataset.json").exists():
            if (self.folder / "data").exists() or (self.folder / "plan").exists():
                raise UserError(
                    f"{self.folder} has data/ or plan/ but no dataset.json, so it is not a "
                    "dataset; name another folder"
                )
            return
        info = read_dataset_info(self.folder)
        if self.options.force_new or not plan_files(self.folder):  # nothing of it will be kept
            return
        require_supported(self.folder, info)
        require_whole(self.folder, info)
        recorded: dict[str, Any] = info["settings"]
        settings = {**self.settings, "schema_version": recorded["schema_version"]}  # which stays
        differing = differences(recorded, settings, neutral_values(ExtractConfig))
        if differing:
            raise UserError(
                f"{self.folder} was made with other settings ({'; '.join(differing)}); choose a "
                "new dataset folder, or pass --force-new to delete this one and start over"
            )
        self.settings = recorded

    def plan(self) -> TaskPlan[Footer]:
        tasks: dict[int, Task] = {}
        committed: dict[int, Footer] = {}
        if not self.options.force_new:
            tasks = load_plan(self.folder)
            committed = self._read_committed(tasks)
        update = self.source.update_plan(tasks, committed)
        self.notices += update.notices
        self.lines = update.lines
        tasks = with_added(tasks, update.added)
        committed = {
            index: footer
            for index, footer in committed.items()
            if footer.task_id == tasks[index].task_id and index not in update.stale
        }
        environments = (footer.environment for footer in committed.values())
        threads = threads_before(environments, self.config.workers)
        return TaskPlan(tasks, update.added, committed, update.gone, threads)

    def begin(self, plan: TaskPlan[Footer]) -> None:
        if self.options.force_new:
            _remove_dataset(self.folder)
        if not plan_files(self.folder):
            self._write_info({})
        if plan.added:
            append_plan(self.folder, plan.added)

    def run(self, plan: TaskPlan[Footer]) -> None:
        if not plan.missing:
            return
        self.console.print(
            f"{len(plan.missing)} of {len(plan.tasks)} tasks to do, "
            f"{plan.missing_hours:.2f} h of audio",
            highlight=False,
        )
        job = ExtractJob(
            self.folder,
            self.source.root,
            self.config,
            fingerprint(self.settings),
            self.weights,
            plan.gone,
            plan.threads,
            self.source.take_over(),
            self.settings["schema_version"],
        )
        self.work = run_tasks(
            extraction(job),
            plan.missing,
            self.options.ray_address,
            self.options.local,
            self.console,
        )
        self.notices += self.work.notices

    def balance(self, plan: TaskPlan[Footer]) -> ExtractOutcome:
        """Balance every committed shard with the plan, and complete what describes the dataset."""
        account, environments = _read_back(self.folder, plan.tasks)
        self.notices += mixed("shards of one dataset", environments)
        if plan.tasks:  # even if nothing was missing: an earlier run may have ended before this
            self._write_info(plan.tasks)
            write_card(self.folder, account)
        return TaskOutcome(account, self.work, self.notices)

    def describe(self, plan: TaskPlan[Footer]) -> None:
        """Print the plan, for --dry-run."""

        def say(line: str) -> None:
            self.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

        for line in self.lines:
            say(line)
        say(f"plan     {len(plan.tasks)} tasks, {len(plan.committed)} of them done")
        for notice in self.notices:
            say(f"note     {notice}")
        say(
            f"to do    {len(plan.missing)} tasks, {plan.missing_hours:.2f} h; nothing was written "
            "(--dry-run)"
        )

    def _read_committed(self, tasks: dict[int, Task]) -> dict[int, Footer]:
        """Return the footers of the shards that match the plan and the settings, by task."""
        wanted = fingerprint(self.settings)
        committed = {}
        for path, footer in read_footers(iter_shards(self.folder)):
            if isinstance(footer, UserError):
                self.notices.append(f"{footer}; its task is done again")
            elif footer.task not in tasks or tasks[footer.task].shard_name != path.name:
                raise UserError(
                    f"{path} belongs to no task of the plan; move it out of the dataset"
                )
            elif footer.fingerprint != wanted:
                self.notices.append(f"{path} was made with other settings; its task is done again")
            elif footer.task_id == tasks[footer.task].task_id:
                committed[footer.task] = footer
        return committed

    def _write_info(self, tasks: dict[int, Task]) -> None:
        source = self.source.root if isinstance(self.source, FromDataset) else None
        write_dataset_json(self.folder, self.config, self.settings, tasks, source)


def _read_back(dataset: Path, tasks: dict[int, Task]) -> tuple[Account, list[dict[str, str]]]:
    """Return the balance of all committed shards, and the environments that made them.

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
    """Delete the files that this program made, and nothing else."""
    if not (dataset / "dataset.json").exists():
        return
    read_dataset_info(dataset)
    for name in ("data", "plan", ".tmp"):
        if (dataset / name).exists():
            shutil.rmtree(dataset / name)
    # dataset.json comes last: as long as it is there, the folder is known to be ours.
    for name in ("README.md", "report.html", "purity.parquet", "dataset.json"):
        (dataset / name).unlink(missing_ok=True)
