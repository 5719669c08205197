"""`extract --from`: new units or f0 from the shards of another dataset, with the same audio.

Each shard of the other dataset is a task of the new one, with the same index, split and songs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset.schema import AUDIO_COLUMNS, SCHEMA_VERSION, audio_columns, pitch_revisions
from pipeline.dataset.shards import (
    Footer,
    iter_shards,
    read_dataset_info,
    read_footers,
    require_supported,
    require_whole,
)
from pipeline.errors import UserError, first_names
from pipeline.extract.clip_sources import damaged_source, origin_of
from pipeline.extract.config import ExtractConfig, fingerprinted, load_config
from pipeline.extract.job import TakenOver
from pipeline.extract.plan_changes import PlanUpdate
from pipeline.fingerprint import counted, differences, neutral_values
from pipeline.settings import flatten
from pipeline.songs.plan import Task, load_plan
from pipeline.storage.weight_files import WeightFile, read_weights
from stages.f0.config import F0Config
from stages.units import EncoderConfig

_AUDIO_SECTIONS = ("audio", "decode", "resample", "slice", "loudness", "quality", "plan")


@dataclass(frozen=True)
class SourceDataset:
    """A dataset whose audio is taken over."""

    dataset: Path
    settings: dict[str, Any]
    fingerprint: str
    base: dict[str, Any]  # sections of its settings, the defaults of the new dataset
    config: ExtractConfig


def read_source(dataset: Path) -> SourceDataset:
    """Read the settings of a dataset.

    Raises: UserError: when `dataset` is not a dataset of Cantor.
    """
    dataset = dataset.absolute()
    info = read_dataset_info(dataset)
    require_supported(dataset, info, oldest=1)
    require_whole(dataset, info)
    if not isinstance(info.get("config"), dict):
        raise UserError(f"{dataset / 'dataset.json'} has no 'config'; only datasets with it serve")
    base = {section: values for section, values in info["config"].items() if section != "workers"}
    if info["schema_version"] == 1 and base["f0"]["method"] != "ensemble":
        base["f0"] = {**base["f0"], "ensemble": None}  # version 1 recorded members for every method
    return SourceDataset(
        dataset, info["settings"], info["fingerprint"], base, load_config(base=base)
    )


def config_from(
    source: SourceDataset, path: Path | None, overrides: Sequence[str]
) -> ExtractConfig:
    """Merge the source's settings, the YAML file at `path` and `key=value` overrides, in order.

    Raises: UserError: when a setting is wrong, or belongs to the audio, which cannot change.
    """
    config = load_config(path, overrides, source.base)
    before = flatten(source.config)
    for key, value in flatten(config).items():
        if key.partition(".")[0] in _AUDIO_SECTIONS and value != before[key]:
            raise UserError(
                f"{key} cannot be {value}: --from takes over the audio of {source.dataset}, which "
                f"was made with {before[key]}"
            )
    return config


@dataclass(frozen=True)
class Reading:
    """The columns that a run takes over from the source, and the weights for the others."""

    source: SourceDataset
    encoders: dict[str, EncoderConfig]
    weights: dict[str, WeightFile]  # of all files that the settings name, by key
    settings: dict[str, Any]
    taken: frozenset[str]  # sections whose columns are taken over: f0, encoder, encoders.log-mel

    @property
    def to_load(self) -> dict[str, WeightFile]:
        return {k: w for k, w in self.weights.items() if k.rpartition(".")[0] not in self.taken}


def compare(source: SourceDataset, config: ExtractConfig) -> Reading:
    """Find the columns of the source that `config` would produce again.

    Checkpoints of such columns need not exist any more.

    Raises: UserError: when there is no other column, or when weights cannot be read.
    """
    before, now = counted(source.config), counted(config)
    known: dict[str, WeightFile] = {}
    counterparts = _counterparts(source.config, config)
    version = source.settings["schema_version"]
    if pitch_revisions(version) != pitch_revisions(SCHEMA_VERSION):
        counterparts["f0"] = ""  # measures that it lacks need f0 as it was before interpolation
    for section, other in counterparts.items():
        paths, others = _paths(config, section), _paths(source.config, other)
        if other and _part(now, section) == _part(before, other) and paths == others:
            for kind, path in paths.items():
                sha256 = source.settings.get(f"{other}.{kind}_sha256")
                if isinstance(sha256, str):
                    known[f"{section}.{kind}"] = WeightFile(path, sha256, 0, 0)
    weights = read_weights(config.weight_paths, known)
    settings = fingerprinted(config, weights)
    taken = {
        section
        for section, other in counterparts.items()
        if other and _same(_part(source.settings, other), _part(settings, section), section)
    }
    all_taken = counterparts.keys() == taken and audio_columns(version) == AUDIO_COLUMNS
    if all_taken and len(source.config.all_encoders) == len(config.all_encoders):
        raise UserError(
            f"{source.dataset} has every column that these settings ask for; add an encoder or "
            "change a setting of f0"
        )
    settings["source.fingerprint"] = source.fingerprint
    return Reading(source, config.all_encoders, weights, settings, frozenset(taken))


def _counterparts(before: ExtractConfig, now: ExtractConfig) -> dict[str, str]:
    """Return the source's section for each section that makes columns, or "" for none."""
    sections = {encoder.name: section for section, encoder in before.all_encoders.items()}
    found = {"f0": "f0"}
    if now.xvector.checkpoint is not None or before.xvector.checkpoint is not None:
        found["xvector"] = "xvector"
    return found | {s: sections.get(e.name, "") for s, e in now.all_encoders.items()}


def _same(before: dict[str, Any], now: dict[str, Any], section: str) -> bool:
    neutral = neutral_values(F0Config if section == "f0" else EncoderConfig)
    return not differences(before, now, neutral)


def _part(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return the settings in a section, without the name, by which sections are paired."""
    start = f"{section}."
    keys = {key: value for key, value in settings.items() if section and key.startswith(start)}
    keys.pop("encoder.name", None)
    return {key.removeprefix(start): value for key, value in keys.items()}


def _paths(config: ExtractConfig, section: str) -> dict[str, str]:
    return _part(config.weight_paths, section)


@dataclass(frozen=True)
class FromDataset:
    """The shards of another dataset as the input of an extraction."""

    reading: Reading

    @property
    def root(self) -> Path:
        return self.reading.source.dataset

    def list_songs(self) -> None:
        """Do nothing: the plan of the source lists its songs."""

    def update_plan(self, tasks: Mapping[int, Task], committed: Mapping[int, Footer]) -> PlanUpdate:
        """Return tasks for shards that are new in the source, or have other songs than before.

        Raises: UserError: when a shard is damaged, or is gone before it was taken over.
        """
        footers, planned = self._shards()
        lost = sorted(tasks.keys() - committed.keys() - footers.keys())
        if lost:
            names = first_names([tasks[index].shard_name for index in lost])
            raise UserError(
                f"{self.root} has lost {len(lost)} shards that are still to be read ({names}); "
                "complete it with its own command, then run this one again"
            )
        added = [planned[index] for index in footers if tasks.get(index) != planned[index]]
        stale = {
            index
            for index in committed.keys() & footers.keys()
            if committed[index].origin != origin_of(footers[index])
        }
        waiting = len(planned) - len(footers)
        notices = []
        if waiting:
            notices.append(
                f"{waiting} of {len(planned)} tasks of {self.root} are not done; complete it, then "
                "run this command again to take them over"
            )
        line = f"source   {len(footers)} of {len(planned)} shards at {self.root}"
        return PlanUpdate(added, frozenset(), notices, [line], frozenset(stale))

    def take_over(self) -> TakenOver:
        """Return the columns to take over. Raises: UserError: when the source has no shard."""
        footers, _ = self._shards()
        if not footers:
            raise UserError(f"{self.root} has no shard yet; complete it first")
        footer = next(iter(footers.values()))
        taken = self.reading.taken
        names = {encoder.name for s, encoder in self.reading.encoders.items() if s in taken}
        return TakenOver(
            self.root,
            self.reading.source.fingerprint,
            footer.schema_version,
            "f0" in taken,
            tuple(identity for identity in footer.encoders if identity.name in names),
            footer.xvector if "xvector" in taken else None,
        )

    def _shards(self) -> tuple[dict[int, Footer], dict[int, Task]]:
        """Return the footers of the shards that match the source's plan, and the plan."""
        planned = load_plan(self.root)
        footers = {}
        for path, footer in read_footers(iter_shards(self.root)):
            if isinstance(footer, UserError):
                raise damaged_source(path, footer)
            task = planned.get(footer.task)
            expected = (self.reading.source.fingerprint, task and task.task_id)
            if (footer.fingerprint, footer.task_id) == expected:
                footers[footer.task] = footer
        return footers, planned
