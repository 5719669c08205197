"""A voice of ours on disk: a folder with `voice.safetensors` and `voice.json`.

The JSON says everything but the weights: what the networks are, which units, rate and pitch they
were trained on, who sings. The weights' file holds the hash of that description, so files of two
voices do not pass for one. docs/voices.md lists the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.checkpoint import (
    OWN_HEADER,
    CheckpointError,
    json_beside,
    read_safetensors,
    save_safetensors,
)
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.json_fields import typed
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.tensor_layout import TensorLayout, fitted, layout_of

WEIGHTS = "voice.safetensors"
DESCRIPTION = "voice.json"
VERSION = 2
_SINCE_2: dict[str, Any] = {"extraction": None, "pitch_hz": {}}
POSTERIOR = "enc_q."  # tensors that only training and resynthesis need
_KIND = "voice"


@dataclass(frozen=True, kw_only=True)
class VoiceEncoder:
    """Whose units a voice sings from. None: not known.

    dim: the width of the units in the dataset; 1 where they are ids of a codebook.
    """

    name: str
    dim: int
    dtype: str | None = None
    frame_rate_hz: float | None = None
    checkpoint_sha256: str | None = None
    codebook_sha256: str | None = None
    codebook_size: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
    """A synthesizer with what one must know to sing with it, or to train it on.

    tensors: the state dict of `Synthesizer(config)`. A voice that was released for singing alone
    may lack the posterior encoder (`enc_q.*`), as a whole. None are of a voice that is a graph.
    speakers: speaker i has row i of the embedding; rows beyond the last name are nobody's.
    expand: which unit a frame takes. f0_min, f0_max: Hz that pitch was looked for in; None: not
    known, like dataset_fingerprint. extraction: the settings by section that made the clips that it
    was trained on, for making the same of a song to convert; None: not known. pitch_hz: of
    speakers, the middle of what they sing. licence: what its maker says of its use.

    Raises ValueError for speakers that are not distinct, or more than the embedding has rows.
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
        twice = {name for name in self.speakers if self.speakers.count(name) > 1}
        if twice:
            raise ValueError(f"speakers names {', '.join(sorted(twice))} more than once")
        if len(self.speakers) > self.config.n_speakers:
            raise ValueError(
                f"speakers has {len(self.speakers)} names, and n_speakers is "
                f"{self.config.n_speakers}"
            )

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
    """Stands where a voice that was released for singing alone has no posterior encoder."""

    def forward(self, *_: object) -> None:
        raise ValueError(
            "this voice was released without its posterior encoder (enc_q): it can sing, but "
            "neither be trained on nor resynthesize a spectrogram"
        )


@functools.cache
def synthesizer_layout(config: SynthesizerConfig, posterior: bool = True) -> TensorLayout:
    layout = layout_of(lambda: Synthesizer(config))
    return layout if posterior else layout.without(POSTERIOR)


def network_of(config: SynthesizerConfig, tensors: Mapping[str, Tensor]) -> Synthesizer:
    """A synthesizer in eval mode with these tensors, which it takes over."""
    with torch.device("meta"):
        network = Synthesizer(config)
    if not any(name.startswith(POSTERIOR) for name in tensors):
        network.enc_q = NoPosterior()
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def load_network(voice: Voice, device: torch.device | str = "cpu") -> Synthesizer:
    """The voice's network, in eval mode, with weights of its own."""
    copies: dict[int, Tensor] = {}
    for tensor in voice.tensors.values():
        copies.setdefault(id(tensor), tensor.detach().clone())
    own = {name: copies[id(tensor)] for name, tensor in voice.tensors.items()}
    return network_of(voice.config, own).to(device)


def save_voice(folder: str | os.PathLike[str], voice: Voice) -> None:
    """Write the voice's two files into `folder`, which is made. Each is written whole or not at
    all, and what a kill between them leaves is refused by `load_voice`.

    Raises CheckpointError for tensors that are not the configuration's.
    """
    folder = Path(folder)
    layout = synthesizer_layout(voice.config, voice.has_posterior)
    tensors = fitted(folder / WEIGHTS, "its configuration", voice.tensors, layout)
    with describing(folder, voice) as metadata:
        save_safetensors(
            folder / WEIGHTS,
            {name: tensor for name, tensor in tensors.items() if layout.first[name] == name},
            metadata,
        )


def load_voice(path: str | os.PathLike[str]) -> Voice:
    """The voice in a folder; either of its files stands for the folder.

    Raises CheckpointError, in a sentence, for a folder without a voice, files of two voices or one
    that was edited, fields and tensors that are missing, misshapen or unknown.
    """
    folder = folder_of(Path(path), WEIGHTS)
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    voice = described(folder / WEIGHTS, metadata)
    posterior = any(name.startswith(POSTERIOR) for name in tensors)
    layout = synthesizer_layout(voice.config, posterior)
    fit = fitted(folder / WEIGHTS, DESCRIPTION, tensors, layout, shared_once=True)
    return dataclasses.replace(voice, tensors=fit)


@contextlib.contextmanager
def describing(folder: Path, voice: Voice) -> Iterator[dict[str, str]]:
    """Writes the description into `folder`, which is made, once the block has written the weights.

    Gives the metadata that the file of weights is to have.
    """
    description = _description(voice)
    header = {"kind": _KIND, "version": VERSION, "description_sha256": _sha256(description)}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / DESCRIPTION) as temporary:
        text = json.dumps(description, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        yield {OWN_HEADER: json.dumps(header)}


def described(weights: Path, metadata: Mapping[str, str]) -> Voice:
    """The voice without its tensors, as the description beside `weights` has it.

    metadata: of the file of weights. Raises CheckpointError as `load_voice`.
    """
    path = weights.with_name(DESCRIPTION)
    content = json_beside(weights, DESCRIPTION)
    fields = _read_description(path, content)
    _require_together(weights, content, metadata)
    try:
        return Voice(tensors={}, **fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def require_same(
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
    """Raises ValueError in a sentence that says what of `what`, such as "the dataset X", differs
    from the voice. What is None, here or in the voice, is not known and not compared; but where an
    encoder is named, no codebook_sha256 means no codebook.
    """
    pairs = (
        ("encoder", voice.encoder.name, encoder),
        ("checkpoint of the encoder, by SHA-256,", voice.encoder.checkpoint_sha256, encoder_sha256),
        ("width of the units", voice.config.units_dim, units_dim),
        ("sample rate", voice.sample_rate, sample_rate),
        ("hop length", voice.hop_length, hop_length),
    )
    differing = [
        f"its {name} is {theirs}, and the voice has {ours}"
        for name, ours, theirs in pairs
        if ours is not None and theirs is not None and ours != theirs
    ]
    if encoder is not None or codebook_sha256 is not None:
        differing += _codebooks_differ(voice.encoder.codebook_sha256, codebook_sha256)
    if differing:
        raise ValueError(f"{what} does not suit this voice: {'; '.join(differing)}")


def _codebooks_differ(ours: str | None, theirs: str | None) -> list[str]:
    if ours == theirs:
        return []
    if ours is None:
        return ["its units are ids of a codebook, and the voice's are not"]
    if theirs is None:
        return ["the voice's units are ids of a codebook, and its are not"]
    return [f"its codebook, by SHA-256, is {theirs}, and the voice has {ours}"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once the block has ended without error."""
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


def folder_of(path: Path, weights: str) -> Path:
    """The folder of the voice that `path` means, which is it or one of its two files.

    weights: the name of the other one. Raises CheckpointError where they are not there.
    """
    folder = path if path.is_dir() else path.parent
    if path != folder and path.name not in (weights, DESCRIPTION):
        raise CheckpointError(
            f"{path} is no voice of ours, which is a folder with {weights} and {DESCRIPTION}; "
            "models of so-vits-svc are read with their config.json"
        )
    for name in (weights, DESCRIPTION):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no voice: it has no {name}")
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
    """voice.json, as its fields are typed."""

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


def _read_description(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Voice` but for its tensors."""
    if content.get("format") != f"cantor {_KIND}":
        raise CheckpointError(f"{path} describes no voice of ours (its format is not stated so)")
    if content.get("version") not in (1, VERSION):
        raise CheckpointError(
            f"{path} is of version {content.get('version')}, and this program reads 1 and {VERSION}"
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


def _require_together(
    weights: Path, content: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    try:
        header = json.loads(metadata.get(OWN_HEADER, "{}"))
        kind, stated = header.get("kind"), header.get("description_sha256")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"the header of {weights} is damaged ({error})") from error
    if kind != _KIND:
        raise CheckpointError(f"{weights} holds no voice of ours")
    if stated != _sha256(content):
        raise CheckpointError(
            f"{weights.name} and {DESCRIPTION} of {weights.parent} are not of one voice: one of "
            "them was replaced, or the description edited (only its licence may be)"
        )


def _sha256(description: Mapping[str, Any]) -> str:
    """Of all that a description says but the licence, however it is laid out."""
    said = {name: value for name, value in description.items() if name != "licence"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
