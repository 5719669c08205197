"""Blending of a song's units with the speaker's own, from an index or a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.encoders.codebook import (
    Codebook,
    load_codebooks,
    load_sovits_codebooks,
    nearest,
)
from models.input_file import read_json
from models.synthesizer.voice import Voice
from pipeline.errors import UserError, first_names
from pipeline.extract.model_checks import name_setting_in_errors, require_same_units
from stages.retrieval import SpeakerIndex, load_index
from stages.types import Array
from stages.units import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class UnitsConfig:
    """Settings of blending. Ratios go from 0 (no effect) to 1 (the speaker's units only).

    index: a folder written by `cantor index`; draws units towards the speaker's frames.
    codebook: a file written by `cantor codebook`, or a kmeans_*.pt of so-vits-svc; draws units
      towards their nearest centres, after the index if both are set.
    protect: share of the original units in unvoiced frames; 0.67 is RVC's 0.33.
    second_pass: encode the output and sing it again.
    """

    index: str | None = None
    index_ratio: float = 0.5
    codebook: str | None = None
    codebook_ratio: float = 0.5
    protect: float = 0.67
    second_pass: bool = False

    def __post_init__(self) -> None:
        for name in ("index_ratio", "codebook_ratio", "protect"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"units.{name} is {getattr(self, name)}; it must lie in 0 to 1")


class UnitControls:
    """The index and the codebook of the settings, for one voice and speaker.

    speaker: None for a mix, which can use neither an index nor a codebook of one speaker.
    Raises: UserError: when a file does not fit this voice.
    """

    def __init__(self, config: UnitsConfig, voice: Voice, speaker: str | None) -> None:
        self.config = config
        self._index = self._codebook = None
        if config.index is not None:
            self._index = _index_of(Path(config.index), voice, speaker)
        if config.codebook is not None:
            self._codebook = _codebook_of(Path(config.codebook), voice, speaker)

    def blend(self, units: Array) -> Array:
        """Blend units (F, D) with the speaker's; return the same array if nothing is set.

        Raises: ValueError: when units are not finite.
        """
        if self._index is not None:
            units = _between(units, self._index.blend(units), self.config.index_ratio)
        if self._codebook is not None:
            centres = self._codebook.centroids
            ids = nearest(torch.tensor(units, dtype=torch.float32), centres)
            units = _between(units, centres[ids].numpy(), self.config.codebook_ratio)
        return units


def _between(units: Array, goal: Array, ratio: float) -> Array:
    mixed: Array = ((1 - ratio) * units + ratio * goal).astype(np.float32)
    return mixed


def _index_of(folder: Path, voice: Voice, speaker: str | None) -> SpeakerIndex:
    where = f"units.index: {folder}"
    if not folder.is_dir():
        raise UserError(f"{where} is not a folder; name one that `cantor index` wrote")
    known = _speakers_indexed(folder)
    if speaker is None or speaker not in known:
        raise UserError(f"{where} has no index {_of(speaker)}; it has {_those_of(known)}")
    with name_setting_in_errors("units.index"):
        index = load_index(folder, speaker)
    note = index.note
    _require_encoder(where, "index", voice, note.encoder, note.checkpoint_sha256)
    _require_width(where, voice, note.dim)
    return index


def _speakers_indexed(folder: Path) -> list[str]:
    """Return the speakers whose notes are in a folder of indexes."""
    names = []
    for path in sorted(folder.glob("*.json")):
        try:
            names.append(str(read_json(path)["speaker"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a note of an index
    return names


def _codebook_of(path: Path, voice: Voice, speaker: str | None) -> Codebook:
    """Return the codebook of the speaker, or else the one of all speakers."""
    where = f"units.codebook: {path}"
    with name_setting_in_errors("units.codebook"):
        read = load_codebooks if path.suffix == ".safetensors" else load_sovits_codebooks
        by_speaker = {each.speaker: each for each in read(path)}
    codebook = by_speaker.get(speaker) or by_speaker.get(None)
    if codebook is None:
        known = [name for name in by_speaker if name is not None]
        raise UserError(f"{where} has no centres {_of(speaker)}; it has {_those_of(known)}")
    if codebook.encoder is not None:
        _require_encoder(where, "codebook", voice, codebook.encoder, codebook.checkpoint_sha256)
        settings = (voice.extraction or {}).get("encoder", {})
        require_same_units(codebook, EncoderConfig(**settings), where)
    _require_width(where, voice, codebook.dim)
    return codebook


def _require_encoder(
    where: str, command: str, voice: Voice, name: str, checkpoint_sha256: str | None
) -> None:
    """Refuse files of another encoder. command: the command that makes one of the right encoder."""
    own = voice.encoder
    again = f"make one with `cantor {command}` from a dataset with this voice's units"
    if name != own.name:
        raise UserError(f"{where} is for units of {name}, but this voice takes {own.name}; {again}")
    if own.checkpoint_sha256 is not None and checkpoint_sha256 != own.checkpoint_sha256:
        theirs = checkpoint_sha256 or "none"
        raise UserError(
            f"{where} is for another checkpoint of {name} (SHA-256 {theirs[:12]}) than this "
            f"voice's ({own.checkpoint_sha256[:12]}); {again}"
        )


def _require_width(where: str, voice: Voice, width: int) -> None:
    own = voice.config.units_dim
    if width != own:
        raise UserError(f"{where} is for units of width {width}, but this voice's have {own}")


def _of(speaker: str | None) -> str:
    return "of a mix of speakers" if speaker is None else f"of speaker '{speaker}'"


def _those_of(speakers: Sequence[str]) -> str:
    return f"those of {names_of(speakers)}" if speakers else "none"


def names_of(speakers: Sequence[str]) -> str:
    """Return the names of the first ten speakers, and how many more there are."""
    return first_names(speakers, 10)
