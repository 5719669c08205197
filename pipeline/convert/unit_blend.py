"""What is done to the units of a song on their way to a voice: they are drawn towards its own."""

from __future__ import annotations

import json
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
from models.synthesizer.voice import Voice
from pipeline.errors import UserError, first_names
from pipeline.extract.model_checks import name_setting_in_errors, require_same_units
from stages.retrieval import SpeakerIndex, load_index
from stages.types import Array
from stages.units import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class UnitsConfig:
    """Units drawn towards those of the speaker; ratios go from 0, not at all, to 1, all the way.

    index: a folder of indexes, which `index` writes; units go towards the speaker's frames.
    codebook: a file that `codebook` writes, or a kmeans_*.pt of so-vits-svc; units go towards
      their nearest centres, after the index where there are both.
    protect: how far units go back to their own where nothing is sung; 0.67 is RVC's 0.33.
    second_pass: what was sung is encoded and sung again.
    """

    index: str | None = None
    index_ratio: float = 0.5
    codebook: str | None = None
    codebook_ratio: float = 0.5
    protect: float = 0.67
    second_pass: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the key that is out of range."""
        for name in ("index_ratio", "codebook_ratio", "protect"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"units.{name} is {getattr(self, name)}; it must lie in 0 to 1")


class UnitControls:
    """The index and the codebook that the settings name, for one voice and speaker.

    speaker: None for a mix, which has no index, and no codebook but one of all speakers.
    Raises: UserError naming what does not belong to this voice, and what does.
    """

    def __init__(self, config: UnitsConfig, voice: Voice, speaker: str | None) -> None:
        self.config = config
        self._index = self._codebook = None
        if config.index is not None:
            self._index = _index_of(Path(config.index), voice, speaker)
        if config.codebook is not None:
            self._codebook = _codebook_of(Path(config.codebook), voice, speaker)

    def blend(self, units: Array) -> Array:
        """Units (F, D) of the voice's encoder, drawn to the speaker's; the same array where nothing
        is set. Raises ValueError for units that are not finite."""
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
        raise UserError(f"{where} is no folder; name the one that `index` wrote from a dataset")
    known = _speakers_indexed(folder)
    if speaker is None or speaker not in known:
        raise UserError(f"{where} has no index {_of(speaker)}; it has {_that_of(known)}")
    with name_setting_in_errors("units.index"):
        found = load_index(folder, speaker)
    note = found.note
    _require_encoder(where, "index", voice, note.encoder, note.checkpoint_sha256)
    _require_width(where, voice, note.dim)
    return found


def _speakers_indexed(folder: Path) -> list[str]:
    """Whose notes are in a folder of indexes."""
    names = []
    for path in sorted(folder.glob("*.json")):
        try:
            names.append(str(json.loads(path.read_text("utf-8"))["speaker"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the note of something else
    return names


def _codebook_of(path: Path, voice: Voice, speaker: str | None) -> Codebook:
    """That of the speaker, else that of all speakers."""
    where = f"units.codebook: {path}"
    with name_setting_in_errors("units.codebook"):
        read = load_codebooks if path.suffix == ".safetensors" else load_sovits_codebooks
        by_speaker = {codebook.speaker: codebook for codebook in read(path)}
    found = by_speaker.get(speaker) or by_speaker.get(None)
    if found is None:
        known = [name for name in by_speaker if name is not None]
        raise UserError(f"{where} has no centres {_of(speaker)}; it has {_that_of(known)}")
    if found.encoder is not None:
        _require_encoder(where, "codebook", voice, found.encoder, found.checkpoint_sha256)
        made_by = (voice.extraction or {}).get("encoder", {})
        require_same_units(found, EncoderConfig(**made_by), where)
    _require_width(where, voice, found.dim)
    return found


def _require_encoder(
    where: str, command: str, voice: Voice, name: str, checkpoint_sha256: str | None
) -> None:
    """`command`: what makes another one."""
    own = voice.encoder
    again = f"`{command}` makes one from a dataset with this voice's units"
    if name != own.name:
        raise UserError(f"{where} is of {name}, and this voice sings from {own.name}; {again}")
    if own.checkpoint_sha256 is not None and checkpoint_sha256 != own.checkpoint_sha256:
        theirs = checkpoint_sha256 or "none"
        raise UserError(
            f"{where} is of {name} with another checkpoint (SHA-256 {theirs[:12]}) than this "
            f"voice's ({own.checkpoint_sha256[:12]}); {again}"
        )


def _require_width(where: str, voice: Voice, width: int) -> None:
    own = voice.config.units_dim
    if width != own:
        raise UserError(f"{where} is of units of width {width}, and this voice's have {own}")


def _of(speaker: str | None) -> str:
    return "of a mix of speakers" if speaker is None else f"of speaker '{speaker}'"


def _that_of(speakers: Sequence[str]) -> str:
    return f"that of {names_of(speakers)}" if speakers else "none"


def names_of(speakers: Sequence[str]) -> str:
    """Return the names of the first ten speakers, and how many more there are."""
    return first_names(speakers, 10)
