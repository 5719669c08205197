"""The weights that a new run begins with, taken over from a voice of ours or of so-vits-svc."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import CheckpointError, read_safetensors
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.files import read_discriminator, read_voice
from models.synthesizer.voice import WEIGHTS, Voice, load_voice, require_same
from pipeline.dataset.schema import EncoderIdentity
from pipeline.errors import UserError, first_names
from pipeline.train.find_voice import weights_file
from pipeline.train.run_folder import TRAINING_FILE, part_of, read_checkpoint

_OF_DISCRIMINATOR = ("spectral_norm", "discriminator_channels")
_MAY_DIFFER = ("n_speakers", "dropout", "source_rate", *_OF_DISCRIMINATOR)
_SHOWN = 8  # speakers named in a line


@dataclass(frozen=True)
class Wanted:
    """The run that begins."""

    config: SynthesizerConfig
    mel: MelConfig
    encoder: EncoderIdentity
    speakers: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """discriminator: None where none was found. lines: what a person should know of it."""

    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None
    source_rate: int
    lines: tuple[str, ...]


def read_start(path: Path, wanted: Wanted) -> Start:
    """Raises UserError where the weights are not of such a voice."""
    try:
        file = weights_file(path)
        voice = load_voice(file) if file.name == WEIGHTS else _read_sovits(file)
        _require_alike(voice, wanted)
        discriminator = _read_discriminator(file, voice, wanted)
    except (ValueError, UserError) as error:
        raise UserError(f"--init-from {path}: {error}") from error
    table, line = _speaker_rows(voice, wanted.speakers)
    lines = [line]
    if discriminator is None:
        lines.append("no such discriminator lies beside it: that begins anew")
    generator = dict(voice.tensors) | {"emb_g.weight": table}
    return Start(generator, discriminator, voice.config.source_rate, tuple(lines))


def _read_sovits(file: Path) -> Voice:
    """Base models come with a configuration of other speakers than theirs, or of none."""
    config = file.parent / "config.json"
    try:
        return read_voice(file, config)
    except CheckpointError:
        return read_voice(file, config, any_speakers=True)


def _read_discriminator(file: Path, voice: Voice, wanted: Wanted) -> dict[str, Tensor] | None:
    """None where there is none, or one of another shape. Raises CheckpointError."""
    if any(getattr(voice.config, key) != getattr(wanted.config, key) for key in _OF_DISCRIMINATOR):
        return None
    if file.name != WEIGHTS:
        beside = file.with_name("D_" + file.name.removeprefix("G_"))
        if not (file.name.startswith("G_") and beside.is_file()):
            return None
        return dict(read_discriminator(beside, voice.config.spectral_norm).state_dict())
    if not (file.parent / TRAINING_FILE).is_file():
        return None
    read_checkpoint(file.parent)  # it is whole
    return part_of(read_safetensors(file.parent / TRAINING_FILE)[0], "discriminator")


def _require_alike(voice: Voice, wanted: Wanted) -> None:
    """Raises ValueError that names what differs."""
    if not voice.has_posterior:
        raise ValueError(
            "it was released for singing alone, without the posterior encoder that training needs"
        )
    require_same(
        voice,
        "the dataset",
        encoder=wanted.encoder.name,
        encoder_sha256=wanted.encoder.checkpoint_sha256,
        codebook_sha256=wanted.encoder.codebook_sha256,
        units_dim=wanted.config.units_dim,
        sample_rate=wanted.config.sample_rate,
        hop_length=wanted.config.hop_length,
    )
    ours = dataclasses.asdict(voice.config) | {"win_length": voice.mel.win_length}
    asked = dataclasses.asdict(wanted.config) | {"win_length": wanted.mel.win_length}
    differing = [
        f"{'mel' if key in ('n_fft', 'win_length') else 'model'}.{key} is {asked[key]}, and the "
        f"voice has {value}"
        for key, value in ours.items()
        if key not in _MAY_DIFFER and value != asked[key]
    ]
    if differing:
        raise ValueError(f"it is of other networks: {'; '.join(differing)}")


def _speaker_rows(voice: Voice, speakers: tuple[str, ...]) -> tuple[Tensor, str]:
    """The table of the new speakers (S, G), and where its rows are from."""
    old = voice.tensors["emb_g.weight"]
    rows = {name: old[row] for row, name in enumerate(voice.speakers)}
    mean = old.mean(0)
    known = [name for name in speakers if name in rows]
    new = [name for name in speakers if name not in rows]
    words = []
    if known:
        words.append(f"those of the same name for {first_names(known, _SHOWN)}")
    if new:
        words.append(f"the mean of its {len(old)} for {first_names(new, _SHOWN)}")
    table = torch.stack([rows.get(name, mean) for name in speakers])
    return table, f"speaker embeddings: {', '.join(words)}"
