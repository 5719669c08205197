"""Cantor voices on disk: a folder with `voice.safetensors` and `voice.json`.

The JSON describes everything but the weights: the networks, the units, rate and pitch that they
were trained on, and the speakers. The weights file contains the hash of that description, so that
files of two voices cannot be mixed up. docs/voices.md lists the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.bounded_meta import most_parameters
from models.checkpoint import (
    OWN_HEADER,
    CheckpointError,
    read_safetensors,
    save_safetensors,
    sibling_json,
)
from models.input_file import parse_json, shown
from models.synthesizer.config import MelConfig, SynthesizerConfig, require_at_least
from models.synthesizer.json_fields import typed
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.tensor_layout import TensorLayout, layout_of, matching_tensors

WEIGHTS = "voice.safetensors"
DESCRIPTION = "voice.json"
VERSION = 2
_SINCE_2: dict[str, Any] = {"extraction": None, "pitch_hz": {}}
POSTERIOR = "enc_q."  # prefix of tensors that only training and resynthesis need
_KIND = "voice"


@dataclass(frozen=True, kw_only=True)
class VoiceEncoder:
    """The encoder whose units a voice takes. None: not known.

    dim: width of the units in the dataset; 1 where they are ids of a codebook.
    """

    name: str
    dim: int
    dtype: str | None = None
    frame_rate_hz: float | None = None
    checkpoint_sha256: str | None = None
    codebook_sha256: str | None = None
    codebook_size: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, "encoder.dim", self.dim)
        if self.codebook_size is not None:
            require_at_least(1, "encoder.codebook_size", self.codebook_size)
        if self.frame_rate_hz is not None and not self.frame_rate_hz > 0:
            raise ValueError(f"encoder.frame_rate_hz is {self.frame_rate_hz}; it must be positive")


@dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
    """A synthesizer with all settings needed for inference and further training.

    tensors: the state dict of `Synthesizer(config)`. A voice released for inference only may lack
    the whole posterior encoder (`enc_q.*`). Empty for a voice stored as an ONNX graph.
    speakers: speaker i has row i of the embedding; rows beyond the last name are unused.
    expand: rule by which a frame takes a unit. f0_min, f0_max: search range of the pitch in Hz;
    None: not known, like dataset_fingerprint. extraction: the settings, by section, that made the
    training clips, so that a song to convert is processed the same way; None: not known.
    pitch_hz: median pitch by speaker. licence: terms of use, as text.

    Raises: ValueError: when speakers are not distinct or more than the embedding has rows.
    """

    tensors: Mapping[str, Tensor]
    config: SynthesizerConfig
    mel: MelConfig
    speakers: tuple[str, ...]
    encoder: VoiceEncoder
    expand: Literal["nearest", "left"] = "nearest"
    f0_method: str | None = None
    f0_min: float | None = None
    f0_max: float | None = None
    step: int = 0
    dataset_fingerprint: str | None = None
    extraction: Mapping[str, Any] | None = None
    pitch_hz: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""

    def __post_init__(self) -> None:
        twice = {name for name, count in Counter(self.speakers).items() if count > 1}
        if twice:
            raise ValueError(f"speakers has {', '.join(sorted(twice))} more than once")
        if len(self.speakers) > self.config.n_speakers:
            raise ValueError(
                f"speakers has {len(self.speakers)} names, and n_speakers is "
                f"{self.config.n_speakers}"
            )
        for name, hz in {"f0_min": self.f0_min, "f0_max": self.f0_max, **self.pitch_hz}.items():
            if hz is not None and not hz > 0:
                raise ValueError(f"the pitch {name!r} is {hz} Hz; it must be positive")

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        return self.config.hop_length

    @property
    def has_posterior(self) -> bool:
        return any(name.startswith(POSTERIOR) for name in self.tensors)


class NoPosterior(nn.Module):
    """Placeholder for the posterior encoder of a voice released for inference only."""

    def forward(self, *_: object) -> None:
        raise ValueError(
            "this voice was released without its posterior encoder (enc_q): it can convert, but "
            "it cannot be trained further or resynthesize a spectrogram"
        )


@functools.lru_cache(maxsize=16)
def synthesizer_layout(
    config: SynthesizerConfig, posterior: bool = True, most: int | None = None
) -> TensorLayout:
    """Return the layout of a synthesizer's tensors.

    posterior: with those of the posterior encoder. most: number of parameters at which to give up.

    Raises: ValueError: when the network has more, or cannot be built.
    """
    layout = layout_of(lambda: Synthesizer(config), most)
    return layout if posterior else layout.without(POSTERIOR)


def layout_for(
    path: Path, config: SynthesizerConfig, tensors: Mapping[str, Any], described: str
) -> TensorLayout:
    """Return the layout of the tensors that a file must have, whose description may be hostile.

    path: of the file. described: the description, for errors.

    Raises: CheckpointError: when the description is of a network far larger than the file.
    """
    posterior = any(str(name).startswith(POSTERIOR) for name in tensors)
    try:
        return synthesizer_layout(config, posterior, most_parameters(len(tensors)))
    except ValueError as error:
        raise CheckpointError(f"{path} does not match {described}: {error}") from error


def network_of(config: SynthesizerConfig, tensors: Mapping[str, Tensor]) -> Synthesizer:
    """Build a synthesizer in eval mode that uses these tensors without a copy."""
    with torch.device("meta"):
        network = Synthesizer(config)
    if not any(name.startswith(POSTERIOR) for name in tensors):
        network.enc_q = NoPosterior()
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def load_network(voice: Voice, device: torch.device | str = "cpu") -> Synthesizer:
    """Build the voice's network in eval mode, with a copy of the weights."""
    copies: dict[int, Tensor] = {}
    for tensor in voice.tensors.values():
        copies.setdefault(id(tensor), tensor.detach().clone())
    own = {name: copies[id(tensor)] for name, tensor in voice.tensors.items()}
    return network_of(voice.config, own).to(device)


def save_voice(folder: str | os.PathLike[str], voice: Voice) -> None:
    """Write the voice's two files into `folder`, which is created.

    Each file is written atomically. If the process is killed between them, `load_voice` refuses the
    result.

    Raises: CheckpointError: when the tensors do not match the configuration.
    """
    folder = Path(folder)
    layout = synthesizer_layout(voice.config, voice.has_posterior)
    tensors = matching_tensors(folder / WEIGHTS, "its configuration", voice.tensors, layout)
    with write_description(folder, voice) as metadata:
        save_safetensors(
            folder / WEIGHTS,
            {name: tensor for name, tensor in tensors.items() if layout.first[name] == name},
            metadata,
        )


def load_voice(path: str | os.PathLike[str]) -> Voice:
    """Load the voice in a folder, given as the folder or one of its files.

    Raises: CheckpointError: when the folder has no voice, the files belong to two voices or one was
    edited, or fields or tensors are missing, unknown or of another shape.
    """
    folder = voice_folder(Path(path), WEIGHTS)
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    voice = read_description(folder / WEIGHTS, metadata)
    layout = layout_for(folder / WEIGHTS, voice.config, tensors, DESCRIPTION)
    tensors = matching_tensors(folder / WEIGHTS, DESCRIPTION, tensors, layout, shared_once=True)
    return dataclasses.replace(voice, tensors=tensors)


@contextlib.contextmanager
def write_description(folder: Path, voice: Voice) -> Iterator[dict[str, str]]:
    """Write the description into `folder`, which is created, after the block wrote the weights.

    Yields the metadata that the weights file must have.
    """
    description = _description(voice)
    header = {"kind": _KIND, "version": VERSION, "description_sha256": _sha256(description)}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / DESCRIPTION) as temporary:
        text = json.dumps(description, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        yield {OWN_HEADER: json.dumps(header)}


def read_description(weights: Path, metadata: Mapping[str, str]) -> Voice:
    """Read the voice without its tensors from the description next to `weights`.

    metadata: of the weights file.

    Raises: CheckpointError: when the description is missing, invalid or of another voice.
    """
    path = weights.with_name(DESCRIPTION)
    content = sibling_json(weights, DESCRIPTION)
    fields = _parse_description(path, content)
    _require_same_voice(weights, content, metadata)
    try:
        return Voice(tensors={}, **fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def described_network(weights: Path) -> SynthesizerConfig:
    """Read the networks' settings from the description next to `weights`.

    Raises: CheckpointError: when the description is missing or invalid.
    """
    config: SynthesizerConfig = _parse_description(
        weights.with_name(DESCRIPTION), sibling_json(weights, DESCRIPTION)
    )["config"]
    return config


def require_compatible(
    voice: Voice,
    what: str,
    *,
    encoder: str | None = None,
    encoder_sha256: str | None = None,
    codebook_sha256: str | None = None,
    units_dim: int | None = None,
    sample_rate: int | None = None,
    hop_length: int | None = None,
) -> None:
    """Check that data made with these settings fit the voice.

    what: the data, such as "the dataset X", for errors. A value that is None, here or in the voice,
    is not known and not compared. With an encoder, however, codebook_sha256=None means no codebook.

    Raises: ValueError: when a value differs (the message names it).
    """
    pairs = (
        ("encoder", voice.encoder.name, encoder),
        ("checkpoint of the encoder, by SHA-256,", voice.encoder.checkpoint_sha256, encoder_sha256),
        ("width of the units", voice.config.units_dim, units_dim),
        ("sample rate", voice.sample_rate, sample_rate),
        ("hop length", voice.hop_length, hop_length),
    )
    differing = [
        f"its {name} is {value}, but the voice has {expected}"
        for name, expected, value in pairs
        if expected is not None and value is not None and expected != value
    ]
    if encoder is not None or codebook_sha256 is not None:
        differing += _codebooks_differ(voice.encoder.codebook_sha256, codebook_sha256)
    if differing:
        raise ValueError(f"{what} does not match this voice: {'; '.join(differing)}")


def _codebooks_differ(expected: str | None, sha256: str | None) -> list[str]:
    if expected == sha256:
        return []
    if expected is None:
        return ["its units are codebook ids, but the voice's are not"]
    if sha256 is None:
        return ["the voice's units are codebook ids, but its units are not"]
    return [f"its codebook, by SHA-256, is {sha256}, but the voice has {expected}"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def voice_folder(path: Path, weights: str) -> Path:
    """Return the folder of a voice, given as the folder or one of its two files.

    weights: name of the weights file.

    Raises: CheckpointError: when a file is missing.
    """
    folder = path if path.is_dir() else path.parent
    if path != folder and path.name not in (weights, DESCRIPTION):
        raise CheckpointError(
            f"{path} is not a Cantor voice, which is a folder with {weights} and {DESCRIPTION}. "
            "A so-vits-svc voice needs config.json in the same folder"
        )
    for name in (weights, DESCRIPTION):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a voice: it has no {name}")
    return folder


def _description(voice: Voice) -> dict[str, Any]:
    return {
        "format": f"cantor {_KIND}",
        "version": VERSION,
        "sample_rate": voice.sample_rate,
        "hop_length": voice.hop_length,
        "speakers": list(voice.speakers),
        "encoder": dataclasses.asdict(voice.encoder),
        "expand": voice.expand,
        "f0": {"method": voice.f0_method, "f0_min": voice.f0_min, "f0_max": voice.f0_max},
        "network": dataclasses.asdict(voice.config),
        "mel": dataclasses.asdict(voice.mel),
        "step": voice.step,
        "dataset_fingerprint": voice.dataset_fingerprint,
        "extraction": voice.extraction,
        "pitch_hz": dict(voice.pitch_hz),
        "licence": voice.licence,
    }


@dataclass(frozen=True, kw_only=True)
class _F0:
    method: str | None
    f0_min: float | None
    f0_max: float | None


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The fields of voice.json and their types."""

    format: Literal["cantor voice"]
    version: int
    sample_rate: int
    hop_length: int
    speakers: tuple[str, ...]
    encoder: VoiceEncoder
    expand: Literal["nearest", "left"]
    f0: _F0
    network: SynthesizerConfig
    mel: MelConfig
    step: int
    dataset_fingerprint: str | None
    extraction: dict[str, Any] | None
    pitch_hz: dict[str, float]
    licence: str


def _parse_description(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Voice`, except its tensors."""
    if content.get("format") != f"cantor {_KIND}":
        raise CheckpointError(f"{path} does not describe a Cantor voice (by its field format)")
    if content.get("version") not in (1, VERSION):
        raise CheckpointError(
            f"{path} has version {shown(content.get('version'))}; this Cantor reads 1 to {VERSION}"
        )
    before = _SINCE_2 if content["version"] == 1 else {}
    try:
        read = typed(_Description, {**before, **content}, "")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, stated, built in (
        ("sample_rate", read.sample_rate, read.network.sample_rate),
        ("hop_length", read.hop_length, read.network.hop_length),
    ):
        if stated != built:
            raise CheckpointError(f"{path}: {name} is {stated}, but its network has {built}")
    return {
        "config": read.network,
        "mel": read.mel,
        "speakers": read.speakers,
        "encoder": read.encoder,
        "expand": read.expand,
        "f0_method": read.f0.method,
        "f0_min": read.f0.f0_min,
        "f0_max": read.f0.f0_max,
        "step": read.step,
        "dataset_fingerprint": read.dataset_fingerprint,
        "extraction": read.extraction,
        "pitch_hz": read.pitch_hz,
        "licence": read.licence,
    }


def _require_same_voice(
    weights: Path, content: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    try:
        header = parse_json(metadata.get(OWN_HEADER, "{}"))
        kind, stated = header.get("kind"), header.get("description_sha256")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{weights} has a damaged header: {error}") from error
    if kind != _KIND:
        raise CheckpointError(f"{weights} does not have the weights of a Cantor voice")
    if stated != _sha256(content):
        raise CheckpointError(
            f"{weights.name} and {DESCRIPTION} in {weights.parent} do not belong together: one of "
            "them was replaced, or the description was edited (only its licence may be)"
        )


def _sha256(description: Mapping[str, Any]) -> str:
    """Hash all fields of a description except the licence, independent of the JSON layout."""
    hashed = {name: value for name, value in description.items() if name != "licence"}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
