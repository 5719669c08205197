"""The settings of a run: owners' dataclasses composed, YAML and key=value merged, fingerprinted."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError
from stages.chain import ChainConfig
from stages.units import EncoderConfig

SCHEMA_VERSION = 1

# Keys that change where and how fast a run works, not what it writes.
_NOT_IN_FINGERPRINT = {
    "plan",
    "workers",
    "decode.timeout_s",
    "decode.memory_mb",
    "f0.device",
    "f0.checkpoint",  # its SHA-256 counts instead
    "encoder.device",
    "encoder.checkpoint",
}


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
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 1.0  # for the units operator, when the cluster has GPUs
    object_store_gb: float | None = None  # None: a tenth of the memory, at most 4; local runs only
    scratch: str | None = None  # folder for decoded PCM; None: the system's temporary folder
    max_task_retries: int = 3  # deaths of a worker on one task before it is redone song by song

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < 1:
            raise ValueError(f"workers.max_workers is {self.max_workers}; it must be 1 or more")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker <= 0:
            raise ValueError("workers.cpus_per_worker and workers.gpus_per_worker must be > 0")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ChainConfig):
    """Every setting of `extract`."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
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

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """The encoders whose units become columns."""
        return (self.encoder,)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> ExtractConfig:
    """Defaults, then the YAML file at `path`, then `key=value` overrides.

    Raises: UserError naming the key or the line that is wrong.
    """
    merged: Any = OmegaConf.structured(ExtractConfig)
    try:
        if path is not None:
            merged = OmegaConf.merge(merged, _checked(_read_yaml(path), merged, str(path)))
        merged = OmegaConf.merge(merged, _checked(_parse_overrides(overrides), merged, "override"))
        for section in merged:
            for name, value in merged[section].items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"{section}.{name} is {value}; it must be a finite number")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{key}{str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(config, ExtractConfig)
    return config


def check_encoder(config: ExtractConfig, local: bool) -> None:
    """Refuse encoders that cannot be built, before anything is written. Imports torch.

    local: the encoders will run in this process, so a CUDA device must be here if one is set.
    Raises: UserError.
    """
    from models.encoders import load_encoder  # torch takes seconds to import

    for encoder in config.encoders:
        try:
            load_encoder(encoder.name, encoder.checkpoint, "cpu")
        except ValueError as error:
            raise UserError(str(error)) from error
        if local and encoder.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UserError(
                    "encoder.device is cuda, but this machine has no CUDA device that torch can "
                    "use; set encoder.device to auto or cpu"
                )


def flatten(config: ExtractConfig) -> dict[str, Any]:
    """`{"slice.threshold_db": -40.0, ...}` for every key."""
    return {
        f"{section}.{name}": value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }


def to_yaml(config: ExtractConfig) -> str:
    return str(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


def fingerprinted(config: ExtractConfig) -> dict[str, Any]:
    """The part of the settings that changes the output, checkpoints by their SHA-256."""
    settings: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for key, value in flatten(config).items():
        if key not in _NOT_IN_FINGERPRINT and key.partition(".")[0] not in _NOT_IN_FINGERPRINT:
            settings[key] = value
    for section, checkpoint in (
        ("f0", config.f0.checkpoint),
        ("encoder", config.encoder.checkpoint),
    ):
        if checkpoint is not None:
            settings[f"{section}.checkpoint_sha256"] = file_sha256(Path(checkpoint))
    return settings


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of `fingerprinted` settings."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no configuration file {path}") from error
    except OSError as error:  # OmegaConf also raises it, without strerror, for a lone number
        raise UserError(f"cannot read settings from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:  # null as a key
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold `section: {{key: value}}`, not a list")
    return dict(OmegaConf.to_container(loaded, resolve=False))  # type: ignore[arg-type]


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or "." not in key:
            raise UserError(f"'{item}' is not an override; write section.key=value")
        if key in seen:
            raise UserError(f"{key} is given twice: '{seen[key]}' and '{item}'")
        seen[key] = item
        section, _, name = key.partition(".")
        try:
            nested.setdefault(section, {})[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of '{item}' is not valid YAML") from error
    return nested


def _checked(values: dict[str, Any], schema: Any, where: str) -> dict[str, Any]:
    """`values`, after refusing unknown keys (with a suggestion) and interpolations."""
    known = {section: set(schema[section]) for section in schema}
    for section, entries in values.items():
        _refuse_other_than_text(section, f"{where}: the section")
        if section not in known:
            raise UserError(f"{where}: unknown section '{section}'{_suggest(section, known)}")
        if entries is None:
            values[section] = {}
            continue
        if not isinstance(entries, dict):
            raise UserError(f"{where}: '{section}' must hold keys, not {entries!r}")
        for name, value in entries.items():
            _refuse_other_than_text(name, f"{where}: in '{section}', the key")
            full = f"{section}.{name}"
            if name not in known[section]:
                every = [f"{s}.{n}" for s, names in known.items() for n in names]
                raise UserError(f"{where}: unknown key '{full}'{_suggest(full, every)}")
            if isinstance(value, str) and "${" in value:
                raise UserError(f"{where}: {full} holds '${{'; interpolation is not supported")
            if value == "???":  # OmegaConf would pass over it
                raise UserError(f"{where}: {full} is '???'; give it a value or leave it out")
    return values


def _refuse_other_than_text(name: object, what: str) -> None:
    if not isinstance(name, str):
        raise UserError(f"{what} {name!r} is not text (YAML reads on, off, yes and no as booleans)")


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(sorted(known))})"
