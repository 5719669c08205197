"""Units: a clip as a sequence of vectors by an encoder, and how they lie in a shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from stages.resample import ResampleConfig, resample
from stages.types import Array

if TYPE_CHECKING:  # torch is slow to import, and settings are read without it
    from models.encoders import Encoder


_GROUP_S = 600.0  # of audio handed to the encoder at a time; it batches within


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder makes the units, and what is done to them.

    checkpoint: a file of weights; None where the encoder needs none.
    device: "auto" is CUDA where there is any.
    normalize: "song" brings every dimension to mean 0 and variance 1 over all clips of a song.
    """

    name: str = "mfcc"
    checkpoint: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    normalize: Literal["none", "song"] = "none"


def encode_units(
    clips: Sequence[Array],
    song_of: Sequence[str],
    sample_rate: int,
    encoder: Encoder,
    cfg: EncoderConfig,
    resample_cfg: ResampleConfig,
) -> list[NDArray[np.float32]]:
    """Units of each clip, float32 (F, D), D and the frame clock being the encoder's.

    clips: (T,) each, at `sample_rate`. song_of: the song id of each; with normalize="song" all
    clips of a song must be in one call.

    Raises ValueError for a clip that the encoder refuses.
    """
    import torch

    if len(clips) != len(song_of):
        raise ValueError(f"{len(clips)} clips, but songs for {len(song_of)}")
    units: list[NDArray[np.float32]] = []
    wavs: list[torch.Tensor] = []
    for clip in clips:
        wav = resample(clip, sample_rate, encoder.sample_rate, resample_cfg)
        # A clip of two samples may resample to none.
        wavs.append(torch.tensor(wav if len(wav) else np.zeros(1), dtype=torch.float32))
        if sum(map(len, wavs)) > _GROUP_S * encoder.sample_rate:  # bounds what a long song holds
            units += [frames.numpy() for frames in encoder.encode(wavs)]
            wavs.clear()
    units += [frames.numpy() for frames in encoder.encode(wavs)]
    return _normalize(units, song_of) if cfg.normalize == "song" else units


def _normalize(
    units: list[NDArray[np.float32]], song_of: Sequence[str]
) -> list[NDArray[np.float32]]:
    """Mean 0 and variance 1 per song and dimension; a dimension that never changes becomes 0."""
    clips_of: dict[str, list[int]] = {}
    for i, song in enumerate(song_of):
        clips_of.setdefault(song, []).append(i)
    out = list(units)
    for indices in clips_of.values():
        song_units = np.concatenate([units[i] for i in indices]).astype(np.float64)  # (F, D)
        mean = song_units.mean(axis=0)
        std = song_units.std(axis=0)
        # What moves by no more than float32 rounding (1e-7 of itself) is not blown up to 1.
        varies = std > 1e-6 * np.abs(mean)
        scale = np.where(varies, 1 / np.where(varies, std, 1.0), 0.0)
        for i in indices:
            out[i] = ((units[i] - mean) * scale).astype(np.float32)
    return out


def pack_units(units: NDArray[np.float32]) -> bytes:
    """(F, D) as it lies in a shard: float16 little-endian, row by row.

    Raises OverflowError, naming dimension and value, for what float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        half = units.astype("<f2")
    if not np.isfinite(half).all():
        frame, dim = np.argwhere(~np.isfinite(half))[0]
        raise OverflowError(
            f"units hold {units[frame, dim]:g} in dimension {dim} of frame {frame}; "
            f"a shard stores float16, which ends at 65504"
        )
    return half.tobytes()


def unpack_units(data: bytes, dim: int) -> NDArray[np.float32]:
    """What `pack_units` packed: float32 (F, dim). ValueError where `dim` does not divide it."""
    if dim < 1 or len(data) % (2 * dim):
        raise ValueError(f"{len(data)} bytes are no float16 frames of width {dim}")
    return np.frombuffer(data, dtype="<f2").reshape(-1, dim).astype(np.float32)
