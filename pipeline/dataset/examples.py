"""Conversion of clips as they lie in shards to examples for a synthesizer.

Random choices for a clip (where it is cropped, how it is augmented) come from a hash of seed, epoch
and clip id: they are the same with any number of workers and after a resume.
Tested by tests/pipeline/dataset/test_shard_dataset.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile as sf
import torch
from torch import Tensor

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.segments import expand_units, volume_of
from pipeline.dataset.clip_index import Identity
from pipeline.dataset.data_config import DataConfig
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
    """The random choices for a clip in an epoch, and the length of its example.

    rate: the sample rate that the clip is assumed to have when it is resampled to its own; a rate
    above its own makes the clip higher and shorter.
    louder: None, or the new level, from 0 for a tenth of the volume to 1 for full scale.
    """

    noise_key: int
    rate: int
    start: int  # frames
    frames: int
    louder: float | None


def draw(
    clip_id: str, num_samples: int, seed: int, epoch: int, identity: Identity, data: DataConfig
) -> Chance:
    """Make the random choices for a clip of `num_samples`, augmented as `data` says."""
    name = f"{seed}\0{epoch}\0{clip_id}".encode()
    digest = hashlib.blake2b(name, digest_size=40).digest()
    key, *numbers = (int.from_bytes(digest[i : i + 8], "little") for i in range(0, 40, 8))
    at, key_at, coin, volume_at = (number / 2**64 for number in numbers)
    hop = identity.hop_length
    rate = _shifted_rate(key_at, num_frames(num_samples, hop), identity.sample_rate, data)
    frames = num_frames(-(-num_samples * identity.sample_rate // rate), hop)
    length = min(frames, data.max_frames)
    return Chance(
        noise_key=key >> 1,
        rate=rate,
        start=int(at * (frames - length + 1)),
        frames=length,
        louder=volume_at if data.volume_augment and coin < 0.5 else None,
    )


def _shifted_rate(at: float, frames: int, sample_rate: int, data: DataConfig) -> int:
    """Return a rate that shifts by up to data.key_shift semitones.

    A clip is not shifted so far up that it becomes too short.
    """
    if data.key_shift == 0:
        return sample_rate
    highest = min(data.key_shift, 12 * math.log2(max(frames / data.min_frames, 1)))
    semitones = -data.key_shift + at * (highest + data.key_shift)
    return math.floor(sample_rate * 2 ** (semitones / 12))


def make_example(
    cell: Cell, chance: Chance, speaker: int, identity: Identity, data: DataConfig
) -> Example:
    """Return the example of a clip. chance: its random choices.

    Raises: DamagedClip: when its columns contradict each other, or do not decode.
    """
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
        raise DamagedClip(f"its f0 has {len(cell.f0)} frames, but its audio has {frames}")
    return wav


def _shifted(
    wav: Array, f0: Array, voiced: Array, rate: int, identity: Identity
) -> tuple[Array, Array, Array]:
    """Resample a clip as if it were recorded at `rate`: pitch, formants and length change.

    f0: without gaps.
    """
    wav = resample(wav, rate, identity.sample_rate, ResampleConfig())
    ratio = rate / identity.sample_rate
    at = np.arange(num_frames(len(wav), identity.hop_length)) * ratio  # in frames of the clip
    moved = np.interp(at, np.arange(len(f0)), f0) * ratio
    nearest = np.minimum(np.rint(at).astype(np.intp), len(f0) - 1)
    return wav, moved.astype(np.float32), voiced[nearest]


def _gain(wav: Array, louder: float) -> np.float32:
    """Return a gain from a tenth to ten times, even in dB, at most to full scale (so-vits-svc)."""
    highest = min(1.0, -math.log10(float(np.abs(wav).max()) + 1e-5))
    return np.float32(10 ** (-1 + louder * (highest + 1)))


def collate(examples: Sequence[Example], frames: int | None = None) -> Batch:
    """Return a batch with zeros after each example, up to `frames`; None: up to the longest."""
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
    """Pad arrays (..., W) of several widths with zeros: (B, ..., width)."""
    out = np.zeros((len(arrays), *arrays[0].shape[:-1], width), np.float32)
    for row, array in zip(out, arrays, strict=True):
        row[..., : array.shape[-1]] = array
    return torch.from_numpy(out)
