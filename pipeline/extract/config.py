"""The settings of `extract`: the owners' dataclasses composed, merged, fingerprinted."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.settings import (
    build_settings,
    check_settings,
    dump_yaml,
    flatten,
    read_settings,
    suggest,
)
from pipeline.storage.weight_files import Weights, read_weights
from stages.chain import ChainConfig
from stages.f0 import check_networks
from stages.units import EncoderConfig, EncoderSettings
from stages.xvector import XvectorConfig

if TYPE_CHECKING:  # torch is slow to import
    from models.encoders.codebook import Codebook

SCHEMA_VERSION = 2

# Keys that change where and how fast a run works, not what it writes. The SHA-256 of a file of
# weights counts in place of its path.
_NOT_IN_FINGERPRINT = {
    "decode.timeout_s",
    "decode.memory_mb",
    "f0.device",
    "f0.checkpoint",
    "xvector.device",
    "xvector.checkpoint",
}
_NOT_OF_AN_ENCODER = {"device", "dtype", "checkpoint", "codebook"}
# Keys of f0 that mean something else to another method, or nothing.
_OF_A_METHOD = {"voicing_threshold", "checkpoint", "ensemble", "crepe_hop_ms"}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How songs are grouped into tasks."""

    task_minutes: float | None = None  # None: a function of the corpus' minutes alone

    def __post_init__(self) -> None:
        if self.task_minutes is not None and not 0.05 <= self.task_minutes <= 240:
            raise ValueError(
                f"plan.task_minutes is {self.task_minutes}; it must lie in 0.05 to 240 minutes"
            )


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """What a run may use of the machine or cluster. Never changes the output."""

    max_workers: int | None = None  # None: as many as the CPUs allow
    cpus_per_worker: float | None = None  # None: 1, or as many as it takes to fit into memory
    gpus_per_worker: float = 1.0  # for the units operator, when the cluster has GPUs
    object_store_gb: float | None = None  # None: a tenth of the memory, at most 4; local runs only
    scratch: str | None = None  # folder for decoded PCM; None: the system's temporary folder
    max_task_retries: int = 3  # deaths of a worker on one task before it is redone song by song

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < 1:
            raise ValueError(f"workers.max_workers is {self.max_workers}; it must be 1 or more")
        cpus = self.cpus_per_worker
        if (cpus is not None and cpus <= 0) or self.gpus_per_worker <= 0:
            raise ValueError("workers.cpus_per_worker and workers.gpus_per_worker must be > 0")


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
        """The encoders whose units become columns, by their section, in the columns' order."""
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
    """Defaults, then `base`, then the YAML file at `path`, then `key=value` overrides.

    base: sections of another run. An encoder of another name there leaves none of its settings to
    this one's, another method of f0 none of what it means by itself, and `encoders.NAME=null`
    leaves one out.
    Raises: UserError naming the key or the line that is wrong.
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
    """Settings of f0 as they were, without those that another method than the given one had."""
    same = given.get("method", before.get("method")) == before.get("method")
    return {key: v for key, v in before.items() if same or key not in _OF_A_METHOD}


def _make_paths_absolute(sections: dict[str, Any]) -> None:
    """In place: workers of a cluster, and a later `--from`, start in other folders."""
    for section in [*sections.values(), *sections.get("encoders", {}).values()]:
        for key in ("checkpoint", "codebook"):
            if isinstance(section.get(key), str):
                section[key] = str(Path(os.path.expanduser(section[key])).absolute())


def check_models(
    config: ExtractConfig, local: bool, taken_over: Collection[str] = frozenset()
) -> None:
    """Refuse models that cannot be built, before anything is written. Imports torch.

    local: they will run in this process, so a CUDA device must be here if one is set.
    taken_over: sections of those whose columns another dataset has.
    Raises: UserError.
    """
    if config.f0.networks and "f0" not in taken_over:
        with naming("f0"):
            check_networks(config.f0)
        if local:
            _require_cuda("f0", config.f0.device)
    from models.encoders import ENCODERS, check_encoder  # torch takes seconds to import

    for section, encoder in config.all_encoders.items():
        if section in taken_over:
            continue
        if encoder.name not in ENCODERS:
            key = "encoder.name" if section == "encoder" else section
            raise UserError(
                f"{key}: encoder '{encoder.name}' is unknown{suggest(encoder.name, ENCODERS)}"
            )
        with naming(section):
            check_encoder(encoder.name, encoder.checkpoint, **encoder.options())
        if local:
            _require_cuda(section, encoder.device)
    if config.xvector.checkpoint is not None and "xvector" not in taken_over:
        from models.encoders.xvector import load_xvector

        with naming("xvector.checkpoint"):
            load_xvector(config.xvector.checkpoint)
        if local:
            _require_cuda("xvector", config.xvector.device)


def _require_cuda(section: str, device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{section}.device is cuda, but this machine has no CUDA device that torch can use; "
            f"set {section}.device to auto or cpu"
        )


def check_codebooks(
    config: ExtractConfig,
    weights: Mapping[str, Weights],
    taken_over: Collection[str] = frozenset(),
) -> None:
    """Refuse codebooks that were not made for their encoders. Raises: UserError."""
    for section, encoder in config.all_encoders.items():
        if section not in taken_over:
            checkpoint = weights.get(f"{section}.checkpoint")
            load_codebook_of(section, encoder, checkpoint.sha256 if checkpoint else None)


def load_codebook_of(
    section: str, encoder: EncoderConfig, checkpoint_sha256: str | None
) -> Codebook | None:
    """The codebook that turns this encoder's units into ids; None where none is set.

    Raises: UserError when it is none, or was made of the units of another encoder.
    """
    if encoder.codebook is None:
        return None
    from models.encoders.codebook import load_codebooks

    with naming(f"{section}.codebook"):
        codebook, *others = load_codebooks(encoder.codebook)
    if others:
        raise UserError(
            f"{section}.codebook: {encoder.codebook} has a codebook for each of {1 + len(others)} "
            "speakers, and ids are to mean the same for all; make one without --per-speaker"
        )
    if codebook.encoder != encoder.name:
        raise UserError(
            f"{section}.codebook: {encoder.codebook} is of {codebook.encoder}, not of "
            f"{encoder.name}; `codebook` makes one from a dataset with this encoder's units"
        )
    if codebook.checkpoint_sha256 != checkpoint_sha256:
        raise UserError(
            f"{section}.codebook: {encoder.codebook} is of {encoder.name} with another "
            f"checkpoint than {encoder.checkpoint}; their units do not share centres"
        )
    require_meaning(codebook, encoder, f"{section}.codebook: {encoder.codebook}")
    return codebook


def require_meaning(codebook: Codebook, encoder: EncoderConfig, where: str) -> None:
    """Raises: UserError where the encoder's settings give units of another meaning."""
    if codebook.settings != encoder.meaning():
        made, asked = (
            ", ".join(f"{key}={value}" for key, value in settings.items()) or "the defaults"
            for settings in (codebook.settings, encoder.meaning())
        )
        raise UserError(
            f"{where} is of units made with {made}, and these are made with {asked}; they do not "
            f"share centres"
        )


@contextmanager
def naming(section: str) -> Iterator[None]:
    """A checkpoint that is refused in here is the user's to put right; the message says whose."""
    try:
        yield
    except ValueError as error:
        words = str(error)  # models know settings of the section `encoder` only
        inside = words.startswith("encoder.")
        words = section + words.removeprefix("encoder") if inside else f"{section}: {words}"
        raise UserError(words) from error


def to_yaml(config: ExtractConfig) -> str:
    values = dataclasses.asdict(config)
    values["encoder"] = {"name": config.encoder.name, **values["encoder"]}
    return dump_yaml(values)


def fingerprinted(
    config: ExtractConfig, weights: Mapping[str, Weights] | None = None
) -> dict[str, Any]:
    """The part of the settings that changes the output, checkpoints by their SHA-256.

    weights: those of `config.weight_paths`, if they have been read already.
    """
    settings = {"schema_version": SCHEMA_VERSION, **counted(config)}
    for key, file in (weights or read_weights(config.weight_paths)).items():
        settings[f"{key}_sha256"] = file.sha256
    return settings


def counted(config: object) -> dict[str, Any]:
    """What changes the output, by key, without the contents of files."""
    return {key: value for key, value in flatten(config).items() if _counts(key)}


def _counts(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section in ("encoder", "encoders"):
        return rest.rpartition(".")[2] not in _NOT_OF_AN_ENCODER
    return section not in ("plan", "workers") and key not in _NOT_IN_FINGERPRINT


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, in words."""
    return "; ".join(
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of `fingerprinted` settings."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
