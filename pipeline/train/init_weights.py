"""Initial weights of a new run, taken from a Cantor or so-vits-svc voice.

Tested by tests/pipeline/train/test_trainer.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import CheckpointError, read_safetensors
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.files import read_discriminator, read_voice
from models.synthesizer.voice import WEIGHTS, Voice, load_voice, require_compatible
from pipeline.dataset.schema import EncoderIdentity
from pipeline.errors import UserError, first_names
from pipeline.train.find_voice import weights_file
from pipeline.train.run_folder import TRAINING_FILE, part_of, read_checkpoint

_DISCRIMINATOR_KEYS = ("spectral_norm", "discriminator_channels")
_MAY_DIFFER = ("n_speakers", "dropout", "source_rate", *_DISCRIMINATOR_KEYS)
_SHOWN = 8  # speakers in a line


@dataclass(frozen=True)
class NewRun:
    """The networks and data of the run that begins."""

    config: SynthesizerConfig
    mel: MelConfig
    encoder: EncoderIdentity
    speakers: tuple[str, ...]


@dataclass(frozen=True)
class InitialWeights:
    """Weights of a voice. discriminator: None if it has none; lines: what to show to the user."""

    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None
    source_rate: int
    lines: tuple[str, ...]


def read_initial_weights(path: Path, run: NewRun) -> InitialWeights:
    """Return the weights of the voice at `path`.

    Raises: UserError: when they do not fit the run.
    """
    try:
        file = weights_file(path)
        voice = load_voice(file) if file.name == WEIGHTS else _read_sovits(file)
        _require_alike(voice, run)
        discriminator = _read_discriminator(file, voice, run)
    except (ValueError, UserError) as error:
        raise UserError(f"--init-from {path}: {error}") from error
    table, line = _speaker_rows(voice, run.speakers)
    lines = [line]
    if discriminator is None:
        lines.append(
            "no matching discriminator beside it; the discriminator starts from random weights"
        )
    generator = dict(voice.tensors) | {"emb_g.weight": table}
    return InitialWeights(generator, discriminator, voice.config.source_rate, tuple(lines))


def _read_sovits(file: Path) -> Voice:
    """Read a voice. The configuration of a base model may list other speakers, or none."""
    config = file.parent / "config.json"
    try:
        return read_voice(file, config)
    except CheckpointError:
        return read_voice(file, config, any_speakers=True)


def _read_discriminator(file: Path, voice: Voice, run: NewRun) -> dict[str, Tensor] | None:
    """Return the discriminator beside a voice; None if there is none, or its shape differs.

    Raises: CheckpointError: when it is damaged.
    """
    if any(getattr(voice.config, key) != getattr(run.config, key) for key in _DISCRIMINATOR_KEYS):
        return None
    if file.name != WEIGHTS:
        beside = file.with_name("D_" + file.name.removeprefix("G_"))
        if not (file.name.startswith("G_") and beside.is_file()):
            return None
        return dict(read_discriminator(beside, voice.config.spectral_norm).state_dict())
    if not (file.parent / TRAINING_FILE).is_file():
        return None
    read_checkpoint(file.parent)  # compares all files with their SHA-256
    return part_of(read_safetensors(file.parent / TRAINING_FILE)[0], "discriminator")


def _require_alike(voice: Voice, run: NewRun) -> None:
    """Compare a voice with the run.

    Raises: ValueError: when they differ, with the keys.
    """
    if not voice.has_posterior:
        raise ValueError(
            "it was released for conversion only, without the posterior encoder that training needs"
        )
    require_compatible(
        voice,
        "the dataset",
        encoder=run.encoder.name,
        encoder_sha256=run.encoder.checkpoint_sha256,
        codebook_sha256=run.encoder.codebook_sha256,
        units_dim=run.config.units_dim,
        sample_rate=run.config.sample_rate,
        hop_length=run.config.hop_length,
    )
    voice_shape = dataclasses.asdict(voice.config) | {"win_length": voice.mel.win_length}
    run_shape = dataclasses.asdict(run.config) | {"win_length": run.mel.win_length}
    differing = [
        f"{'mel' if key in ('n_fft', 'win_length') else 'model'}.{key} is {run_shape[key]}, but "
        f"the voice has {value}"
        for key, value in voice_shape.items()
        if key not in _MAY_DIFFER and value != run_shape[key]
    ]
    if differing:
        raise ValueError(f"its networks differ: {'; '.join(differing)}")


def _speaker_rows(voice: Voice, speakers: tuple[str, ...]) -> tuple[Tensor, str]:
    """Return the embeddings of the new speakers (S, G), and a line about their origin."""
    old = voice.tensors["emb_g.weight"]
    rows = {name: old[row] for row, name in enumerate(voice.speakers)}
    mean = old.mean(0)
    known = [name for name in speakers if name in rows]
    new = [name for name in speakers if name not in rows]
    origins = []
    if known:
        origins.append(f"those of the same name for {first_names(known, _SHOWN)}")
    if new:
        origins.append(f"the mean of its {len(old)} for {first_names(new, _SHOWN)}")
    table = torch.stack([rows.get(name, mean) for name in speakers])
    return table, f"speaker embeddings: {', '.join(origins)}"
