"""The index of a dataset's clips for trainers, made from footers and narrow columns.

Tested by tests/pipeline/dataset/test_shard_dataset.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.dataset.folder import DatasetFolder
from pipeline.dataset.row_groups import RowGroups, choose_encoder, read_row_groups
from pipeline.dataset.schema import EncoderIdentity
from pipeline.errors import UserError
from stages.errors import Reason
from stages.pcm import Subtype


@dataclass(frozen=True)
class Identity:
    """The formats of clips and units: a voice belongs to data with the same."""

    sample_rate: int
    hop_length: int
    encoder: EncoderIdentity
    f0_method: str
    fingerprint: str
    speakers: tuple[str, ...]  # sorted; a speaker's number is its place
    subtype: Subtype


@dataclass(frozen=True)
class ClipIndex:
    """The clips of a split in the order of shards and rows; (N,) arrays, one entry a clip.

    A million clips take 100 MB: 24 bytes and the name of each.
    """

    row_groups: RowGroups
    identity: Identity
    left_out: dict[str, int]  # clips of the split that are not here, by reason
    song_ids: tuple[str, ...]
    clip_ids: pa.StringArray
    song: NDArray[np.int32]  # place in song_ids
    speaker: NDArray[np.int32]  # place in identity.speakers
    num_samples: NDArray[np.int64]
    group: NDArray[np.int32]  # number of the row group
    row: NDArray[np.int32]  # in the row group

    def __len__(self) -> int:
        return len(self.num_samples)

    def take(self, chosen: NDArray[np.bool_]) -> ClipIndex:
        """Return the clips where `chosen` (N,) is true; songs and speakers keep their numbers."""
        per_clip = {name: getattr(self, name)[chosen] for name in _PER_CLIP}
        return replace(self, clip_ids=self.clip_ids.filter(pa.array(chosen)), **per_clip)

    def singers(self) -> dict[str, str]:
        """Return the speaker of each song."""
        songs, first = np.unique(self.song, return_index=True)
        speakers = self.identity.speakers
        return {
            self.song_ids[song]: speakers[speaker]
            for song, speaker in zip(songs, self.speaker[first], strict=True)
        }


_PER_CLIP = ("song", "speaker", "num_samples", "group", "row")
_NARROW = ("clip_id", "song_id", "speaker", "num_samples")
_PITCH = ("speaker", "f0_low_hz", "f0_high_hz", "voiced_ratio", "num_samples")
_CLIP_SECTIONS = ("audio", "decode", "resample", "slice", "loudness", "f0")  # of the settings


def read_index(
    folder: DatasetFolder, split: str, encoder: str | None, min_frames: int
) -> ClipIndex:
    """Return the clips of `split` of `min_frames` or more. Reads footers and narrow columns.

    encoder: which units are wanted; None where the dataset has those of one encoder.
    Speakers are those of these clips, so that each has something to be learnt from.

    Raises: UserError: when this is not a dataset, has no such split, encoder or clips, its units
    are ids of a codebook, its f0 has no gaps, or its shards do not belong together.
    """
    _refuse_filled_f0(folder)
    row_groups, rows = read_row_groups(folder, split, lambda _: _NARROW)
    footer = row_groups.footer
    identity = choose_encoder(footer, folder, encoder)
    least = max(1, min_frames) * footer.hop_length
    clips = rows.filter(pc.greater_equal(rows["num_samples"], least))
    too_short = len(rows) - len(clips)
    if not len(clips):
        short = f"; {too_short} are shorter than data.min_frames, {min_frames}" if too_short else ""
        raise UserError(f"{folder.name} has no clips to train from in its split '{split}'{short}")
    speakers, speaker = _numbered(clips["speaker"])
    song_ids, song = _numbered(clips["song_id"])
    return ClipIndex(
        row_groups=row_groups,
        identity=Identity(
            footer.sample_rate,
            footer.hop_length,
            identity,
            footer.f0_method,
            footer.fingerprint,
            speakers,
            footer.subtype,
        ),
        left_out={str(Reason.TOO_SHORT): too_short} if too_short else {},
        song_ids=song_ids,
        clip_ids=clips["clip_id"].combine_chunks(),
        song=song,
        speaker=speaker,
        num_samples=clips["num_samples"].to_numpy(),
        group=clips["group"].to_numpy(),
        row=clips["row"].to_numpy(),
    )


def extraction_of(folder: DatasetFolder, encoder: str) -> dict[str, Any] | None:
    """Return the settings, by section, that made the clips and the units of `encoder`.

    None: dataset.json does not state them. Raises: UserError: when it cannot be read.
    """
    config = folder.read_info().get("config")
    if config is None:
        return None
    settings = {"encoder": config["encoder"]}
    if config["encoder"]["name"] != encoder:
        settings = {"encoder": {"name": encoder, **config["encoders"][encoder]}}
    return {section: config[section] for section in _CLIP_SECTIONS} | settings


def pitch_of_speakers(folder: DatasetFolder, split: str) -> dict[str, float]:
    """Return the average pitch (Hz) of each speaker who sings in a split.

    The pitch of a clip is the geometric mean of its low and high end; clips are weighted by their
    voiced samples. Raises: UserError: when a shard is damaged.
    """
    _, clips = read_row_groups(folder, split, lambda _: _PITCH)
    names, speaker = _numbered(clips["speaker"])
    low, high, voiced = (clips[name].to_numpy() for name in _PITCH[1:4])
    weight = np.where(low > 0, voiced * clips["num_samples"].to_numpy(), 0.0)
    middle = np.log(np.where(low > 0, low * high, 1.0)) / 2
    total = np.bincount(speaker, weight, len(names))
    with np.errstate(invalid="ignore"):
        pitch = np.exp(np.bincount(speaker, weight * middle, len(names)) / total)
    return {name: float(hz) for name, hz, w in zip(names, pitch, total, strict=True) if w > 0}


def _refuse_filled_f0(folder: DatasetFolder) -> None:
    if folder.read_info()["settings"].get("f0.interpolate"):
        raise UserError(
            f"{folder.name} has f0 without gaps (f0.interpolate=true), so unvoiced frames are "
            f"unknown; `extract --from {folder.name} NEW f0.interpolate=false` makes a dataset "
            f"with gaps"
        )


def _numbered(column: pa.ChunkedArray) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Return the different values of a column, sorted, and the place of each cell among them."""
    encoded = column.dictionary_encode().combine_chunks()
    values = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(values)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    return tuple(values[order]), place[encoded.indices.to_numpy()]
