"""Settings of `extract`, composed of the stages' dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cluster.workload import WorkersConfig
from pipeline.dataset.schema import SCHEMA_VERSION
from pipeline.fingerprint import counted
from pipeline.settings import (
    build_settings,
    check_settings,
    dump_yaml,
    read_settings,
)
from pipeline.storage.weight_files import WeightFile, read_weights
from stages.chain import ChainConfig
from stages.units import EncoderConfig, EncoderSettings
from stages.xvector import XvectorConfig

# Settings of f0 that other methods do not have, or use with another meaning.
_METHOD_SETTINGS = {"voicing_threshold", "checkpoint", "ensemble", "crepe_hop_ms"}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Settings for the grouping of songs into tasks."""

    task_minutes: float | None = None  # None: a function of the corpus' minutes alone

    def __post_init__(self) -> None:
        if self.task_minutes is not None and not 0.05 <= self.task_minutes <= 240:
            raise ValueError(
                f"plan.task_minutes is {self.task_minutes}; it must lie in 0.05 to 240 minutes"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ChainConfig):
    """Every setting of `extract`."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encoders: dict[str, EncoderSettings] = field(default_factory=dict)  # further ones, by name
    xvector: XvectorConfig = field(default_factory=XvectorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        rate = self.audio.sample_rate
        if not self.f0.f0_max < rate / 2:
            raise ValueError(
                f"f0.f0_max is {self.f0.f0_max}; it must be below half of audio.sample_rate, {rate}"
            )
        if rate > 65535 and rate % 10 != 0:
            raise ValueError(
                f"audio.sample_rate is {rate}; above 65535 Hz, FLAC takes multiples of 10 only"
            )

        if self.encoder.name in self.encoders:
            raise ValueError(
                f"{self.encoder.name} is named twice, by encoder.name and by encoders."
                f"{self.encoder.name}; the units of each encoder are one column"
            )

    @property
    def all_encoders(self) -> dict[str, EncoderConfig]:
        """The encoders by their section, in the order of their columns of units."""
        further = {
            f"encoders.{name}": EncoderConfig(name=name, **dataclasses.asdict(settings))
            for name, settings in sorted(self.encoders.items())
        }
        return {"encoder": self.encoder, **further}

    @property
    def weight_paths(self) -> dict[str, str]:
        """The path of every checkpoint and codebook that is set, by its key."""
        paths = {
            "f0.checkpoint": self.f0.checkpoint,
            "xvector.checkpoint": self.xvector.checkpoint,
        }
        for section, encoder in self.all_encoders.items():
            paths[f"{section}.checkpoint"] = encoder.checkpoint
            paths[f"{section}.codebook"] = encoder.codebook
        return {key: path for key, path in paths.items() if path is not None}


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> ExtractConfig:
    """Merge the defaults, `base`, the YAML file at `path` and `key=value` overrides, in this order.

    base: sections of another run. Settings of its encoder do not apply to an encoder of another
    name, nor settings of its f0 method to another method; `encoders.NAME=null` removes an encoder.

    Raises: UserError: when a key or a line is wrong (the message names it).
    """
    given = read_settings(ExtractConfig, path, overrides)
    before = check_settings(ExtractConfig, copy.deepcopy(dict(base or {})), "the source")
    name = before.get("encoder", {}).get("name")
    if given.get("encoder", {}).get("name", name) != name:
        before["encoder"] = {}
    before["f0"] = of_the_same_method(before.get("f0", {}), given.get("f0", {}))
    for name in [name for name, s in given.get("encoders", {}).items() if s is None]:
        del given["encoders"][name]
        before.get("encoders", {}).pop(name, None)
    _make_paths_absolute(given)
    return build_settings(ExtractConfig, before, given)


def of_the_same_method(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of f0 without those that only apply to another method than the given."""
    same = given.get("method", before.get("method")) == before.get("method")
    return {key: v for key, v in before.items() if same or key not in _METHOD_SETTINGS}


def _make_paths_absolute(sections: dict[str, Any]) -> None:
    """Change paths in place: workers of a cluster, and a later `--from`, start in other folders."""
    for section in [*sections.values(), *sections.get("encoders", {}).values()]:
        for key in ("checkpoint", "codebook"):
            if isinstance(section.get(key), str):
                section[key] = str(Path(os.path.expanduser(section[key])).absolute())


def to_yaml(config: ExtractConfig) -> str:
    values = dataclasses.asdict(config)
    values["encoder"] = {"name": config.encoder.name, **values["encoder"]}
    return dump_yaml(values)


def fingerprinted(
    config: ExtractConfig, weights: Mapping[str, WeightFile] | None = None
) -> dict[str, Any]:
    """Return the part of the settings that changes the output, checkpoints by their SHA-256.

    weights: those of `config.weight_paths`, if they have been read already.
    """
    settings = {"schema_version": SCHEMA_VERSION, **counted(config)}
    for key, file in (weights or read_weights(config.weight_paths)).items():
        settings[f"{key}_sha256"] = file.sha256
    return settings
