"""From a clip as it lies in a shard to what a synthesizer learns from.

What chance decides for a clip (where it is cropped, how it is changed) comes from a hash of seed,
epoch and clip id: it is the same on any number of workers and after any interruption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile as sf
import torch
from torch import Tensor

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.segments import expand_units, volume_of
from models.synthesizer.config import require_at_least
from pipeline.dataset.clip_index import Identity
from pipeline.dataset.row_groups import DamagedClip, unpack_clip_units
from stages.f0.sovits_compat import fill_unvoiced
from stages.flac import decode_flac
from stages.frames import num_frames
from stages.pcm import dequantise
from stages.resample import ResampleConfig, resample
from stages.types import Array


@dataclass(frozen=True)
class Cell:
    """A clip as it lies in a shard."""

    clip_id: str
    flac: bytes
    f0: Array  # (F,) Hz, 0 = unvoiced
    units: bytes
    unit_frames: int


@dataclass(frozen=True)
class Example:
    """A clip, or a stretch of it, on the frame clock: F frames, F * hop_length samples."""

    clip_id: str
    units: Array  # (D, F)
    f0: Array  # (F,) Hz, continued through unvoiced frames; 0 where no frame of the clip is voiced
    voiced: Array  # (F,) 1 = voiced
    volume: Array  # (F,) RMS
    wav: Array  # (F * hop_length,)
    speaker: int
    noise_key: int

    def __len__(self) -> int:
        return len(self.f0)


@dataclass(frozen=True)
class Chance:
    """What chance decides for a clip in an epoch, and how long its example thus is.

    rate: the sample rate that the clip is taken to have before it is resampled to its own; above
    its own, the clip becomes higher and shorter.
    louder: None, or where between a tenth and as loud as can be, 0 to 1.
    """

    noise_key: int
    rate: int
    start: int  # frames
    frames: int
    louder: float | None


def draw(
    clip_id: str, num_samples: int, seed: int, epoch: int, identity: Identity, data: DataConfig
) -> Chance:
    """Chance for a clip of `num_samples`, augmented as `data` says."""
    name = f"{seed}\0{epoch}\0{clip_id}".encode()
    digest = hashlib.blake2b(name, digest_size=40).digest()
    key, *numbers = (int.from_bytes(digest[i : i + 8], "little") for i in range(0, 40, 8))
    at, key_at, coin, volume_at = (number / 2**64 for number in numbers)
    hop = identity.hop_length
    rate = _shifted_rate(key_at, num_frames(num_samples, hop), identity.sample_rate, data)
    frames = num_frames(-(-num_samples * identity.sample_rate // rate), hop)
    kept = min(frames, data.max_frames)
    return Chance(
        noise_key=key >> 1,
        rate=rate,
        start=int(at * (frames - kept + 1)),
        frames=kept,
        louder=volume_at if data.volume_augment and coin < 0.5 else None,
    )


def _shifted_rate(at: float, frames: int, sample_rate: int, data: DataConfig) -> int:
    """Up or down by data.key_shift semitones; not so far up that the clip becomes too short."""
    if data.key_shift == 0:
        return sample_rate
    highest = min(data.key_shift, 12 * math.log2(max(frames / data.min_frames, 1)))
    semitones = -data.key_shift + at * (highest + data.key_shift)
    return math.floor(sample_rate * 2 ** (semitones / 12))


def make_example(
    cell: Cell, chance: Chance, speaker: int, identity: Identity, data: DataConfig
) -> Example:
    """`chance` as it was drawn for the clip. Raises: DamagedClip."""
    hop = identity.hop_length
    wav, f0 = _decoded(cell, identity), cell.f0
    voiced = (f0 > 0).astype(np.float32)
    f0 = fill_unvoiced(f0.astype(np.float64), identity.sample_rate, hop).astype(np.float32)
    if chance.rate != identity.sample_rate:
        wav, f0, voiced = _shifted(wav, f0, voiced, chance.rate, identity)
    if chance.louder is not None:
        wav = wav * _gain(wav, chance.louder)
    packed = unpack_clip_units(cell.units, cell.unit_frames, identity.encoder)
    units = expand_units(packed, len(f0), data.expand)  # (F, D)
    cut = slice(chance.start, chance.start + chance.frames)
    return Example(
        clip_id=cell.clip_id,
        units=units[cut].T,
        f0=f0[cut],
        voiced=voiced[cut],
        volume=volume_of(wav, hop)[cut],
        wav=wav[cut.start * hop : cut.stop * hop],
        speaker=speaker,
        noise_key=chance.noise_key,
    )


def _decoded(cell: Cell, identity: Identity) -> Array:
    try:
        wav = dequantise(decode_flac(cell.flac, identity.subtype), identity.subtype)
    except sf.LibsndfileError as error:
        raise DamagedClip(f"its audio does not decode: {error}") from error
    frames = num_frames(len(wav), identity.hop_length)
    if len(cell.f0) != frames:
        raise DamagedClip(f"its f0 has {len(cell.f0)} frames, and its audio {frames}")
    return wav


def _shifted(
    wav: Array, f0: Array, voiced: Array, rate: int, identity: Identity
) -> tuple[Array, Array, Array]:
    """The clip as if it were recorded at `rate`: pitch and formants move, and so does the length.

    f0: without gaps.
    """
    wav = resample(wav, rate, identity.sample_rate, ResampleConfig())
    ratio = rate / identity.sample_rate
    at = np.arange(num_frames(len(wav), identity.hop_length)) * ratio  # in frames of the clip
    moved = np.interp(at, np.arange(len(f0)), f0) * ratio
    nearest = np.minimum(np.rint(at).astype(np.intp), len(f0) - 1)
    return wav, moved.astype(np.float32), voiced[nearest]


def _gain(wav: Array, louder: float) -> np.float32:
    """From a tenth to ten times, evenly in dB; no further up than full scale. As so-vits-svc."""
    highest = min(1.0, -math.log10(float(np.abs(wav).max()) + 1e-5))
    return np.float32(10 ** (-1 + louder * (highest + 1)))


def collate(examples: Sequence[Example], frames: int | None = None) -> Batch:
    """Examples with zeros after each, up to `frames`; None: up to the longest of them."""
    hop = len(examples[0].wav) // len(examples[0])
    width = max(map(len, examples)) if frames is None else frames
    return Batch(
        clip_ids=tuple(example.clip_id for example in examples),
        units=_padded([example.units for example in examples], width),
        f0=_padded([example.f0 for example in examples], width),
        voiced=_padded([example.voiced for example in examples], width),
        volume=_padded([example.volume for example in examples], width),
        wav=_padded([example.wav for example in examples], width * hop),
        speaker=torch.tensor([example.speaker for example in examples]),
        lengths=torch.tensor([len(example) for example in examples]),
        noise_keys=tuple(example.noise_key for example in examples),
    )


def _padded(arrays: Sequence[Array], width: int) -> Tensor:
    """(..., W) of several widths -> (B, ..., width), zeros after each."""
    out = np.zeros((len(arrays), *arrays[0].shape[:-1], width), np.float32)
    for row, array in zip(out, arrays, strict=True):
        row[..., : array.shape[-1]] = array
    return torch.from_numpy(out)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips make the examples, and how a clip becomes one.

    encoder: whose units; None where the dataset has one encoder's.
    split: of the dataset, as its manifest names it.
    validation: the share of songs that is held back to validate with, whole songs always.
    max_frames: of an example; of a longer clip a stretch is taken, another one in each epoch.
    expand: which unit a frame takes; so-vits-svc's `unit_interpolate_mode`.
    volume_augment: clips are made louder or softer at random, down to a tenth.
    key_shift: semitones, the most that clips are moved up or down, formants with them.
    """

    encoder: str | None = None
    split: str = "train"
    validation: float = 0.02
    batch_size: int = 6  # clips a step, of all workers together
    max_frames: int = 790
    min_frames: int = 30  # shorter clips are left out, and counted
    expand: Literal["nearest", "left"] = "nearest"
    volume_augment: bool = False
    key_shift: float = 0.0
    shuffle_groups: int = 16  # row groups that are mixed at a time; each worker holds them
    loader_threads: int = 2  # of each worker
    prefetch: int = 4  # batches

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}; it must lie in 0 to 1")
        for name in ("batch_size", "max_frames", "shuffle_groups", "loader_threads", "prefetch"):
            require_at_least(1, f"data.{name}", getattr(self, name))
        if self.max_frames < self.min_frames:
            raise ValueError(
                f"data.max_frames is {self.max_frames}; it must be data.min_frames, "
                f"{self.min_frames}, or more"
            )
        if not 0 <= self.key_shift <= 12:
            raise ValueError(f"data.key_shift is {self.key_shift}; it must lie in 0 to 12")
