"""The settings of a run: owners' dataclasses composed, YAML and key=value merged, fingerprinted."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError
from pipeline.weights import Weights, read_weights
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
_LISTS = {"f0.ensemble"}
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
    try:
        file = {} if path is None else _checked(_read_yaml(path), str(path))
        both = OmegaConf.merge(file, _checked(_parse_overrides(overrides), "override"))
        given: Any = OmegaConf.to_container(both)
        before = {} if base is None else _checked(copy.deepcopy(dict(base)), "the source")
        name = before.get("encoder", {}).get("name")
        if given.get("encoder", {}).get("name", name) != name:
            before["encoder"] = {}
        f0 = before.get("f0", {})
        if given.get("f0", {}).get("method", f0.get("method")) != f0.get("method"):
            before["f0"] = {key: v for key, v in f0.items() if key not in _OF_A_METHOD}
        for name in [name for name, s in given.get("encoders", {}).items() if s is None]:
            del given["encoders"][name]
            before.get("encoders", {}).pop(name, None)
        _make_paths_absolute(given)
        merged = OmegaConf.merge(OmegaConf.structured(ExtractConfig), before, given)
        for key, value in _flat(OmegaConf.to_container(merged)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key} is {value}; it must be a finite number")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{key}{str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(config, ExtractConfig)
    return config


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
                f"{key}: encoder '{encoder.name}' is unknown{_suggest(encoder.name, ENCODERS)}"
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
    if codebook.settings != encoder.meaning():
        made, asked = (
            ", ".join(f"{key}={value}" for key, value in settings.items()) or "the defaults"
            for settings in (codebook.settings, encoder.meaning())
        )
        raise UserError(
            f"{section}.codebook: {encoder.codebook} is of units made with {made}, and these are "
            f"made with {asked}; they do not share centres"
        )
    return codebook


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


def flatten(config: ExtractConfig) -> dict[str, Any]:
    """`{"slice.threshold_db": -40.0, ..., "encoders.log-mel.device": "auto"}` for every key."""
    return _flat(dataclasses.asdict(config))


def _flat(sections: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        for name, value in values.items():
            if section == "encoders":
                flat |= {f"{section}.{name}.{key}": each for key, each in value.items()}
            else:  # a list, where there is one, as JSON gives it back
                flat[f"{section}.{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def to_yaml(config: ExtractConfig) -> str:
    values = dataclasses.asdict(config)
    values["encoder"] = {"name": config.encoder.name, **values["encoder"]}
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


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


def counted(config: ExtractConfig) -> dict[str, Any]:
    """What changes the output, by key, without the contents of files."""
    return {key: value for key, value in flatten(config).items() if _counts(key)}


def _counts(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section in ("encoder", "encoders"):
        return rest.rpartition(".")[2] not in _NOT_OF_AN_ENCODER
    return section not in ("plan", "workers") and key not in _NOT_IN_FINGERPRINT


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of `fingerprinted` settings."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


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
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of '{item}' is not valid YAML") from error
        section, _, name = key.partition(".")
        if section == "encoders" and "." in name:
            name, _, setting = name.partition(".")
            value = {setting: value}
        values = nested.setdefault(section, {})
        before = values.setdefault(name, value)
        if before is not value:
            both = isinstance(before, dict) and isinstance(value, dict)
            if not both or before.keys() & value.keys():
                raise UserError(f"'{item}' gives again what another setting gives")
            before |= value
    return nested


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values`, after refusing unknown keys (with a suggestion) and interpolations."""
    known = _known_keys()
    for section, entries in values.items():
        _refuse_other_than_text(section, f"{where}: the section")
        if section not in known:
            raise UserError(f"{where}: unknown section '{section}'{_suggest(section, known)}")
        if entries is None:
            values[section] = {}
        elif section == "encoders":
            _check_further(entries, where)
        else:
            _check_keys(section, entries, known[section], where)
    return values


def _check_further(encoders: Any, where: str) -> None:
    """Of the section `encoders`: settings by the name of the encoder; null leaves one out."""
    if not isinstance(encoders, dict):
        raise UserError(f"{where}: 'encoders' must hold `name: {{key: value}}`, not {encoders!r}")
    keys = {field.name for field in dataclasses.fields(EncoderSettings)}
    for name, entries in encoders.items():
        _refuse_other_than_text(name, f"{where}: in 'encoders', the name")
        if entries is not None:
            _check_keys(f"encoders.{name}", entries, keys, where)
        elif where != "override":
            raise UserError(f"{where}: encoders.{name} is empty; write {{}} for its defaults")


def _check_keys(section: str, entries: Any, known: Collection[str], where: str) -> None:
    if not isinstance(entries, dict):
        raise UserError(f"{where}: '{section}' must hold keys, not {entries!r}")
    for name, value in entries.items():
        _refuse_other_than_text(name, f"{where}: in '{section}', the key")
        full = f"{section}.{name}"
        if name not in known:
            every = [f"{s}.{n}" for s, names in _known_keys().items() for n in names]
            every += [f"{section}.{n}" for n in known]
            raise UserError(f"{where}: unknown key '{full}'{_suggest(full, every)}")
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{where}: {full} holds '${{'; interpolation is not supported")
        if full in _LISTS and not isinstance(value, list | tuple | None):
            raise UserError(f"{where}: {full} must be a list in brackets, [a, b], not {value!r}")
        if value == "???":  # OmegaConf would pass over it
            raise UserError(f"{where}: {full} is '???'; give it a value or leave it out")


def _known_keys() -> dict[str, set[str]]:
    return {section: set(values) for section, values in dataclasses.asdict(ExtractConfig()).items()}


def _refuse_other_than_text(name: object, what: str) -> None:
    if not isinstance(name, str):
        raise UserError(f"{what} {name!r} is not text (YAML reads on, off, yes and no as booleans)")


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(sorted(known))})"
