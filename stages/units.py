"""Units: a clip as a sequence of vectors by an encoder, and how they lie in a shard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.clip_groups import in_groups
from stages.resample import ResampleConfig, resample
from stages.types import Array

if TYPE_CHECKING:  # torch is slow to import, and settings are read without it
    from torch import Tensor

    from models.encoders import Encoder


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How an encoder makes units, and what is done to them.

    checkpoint: a file or folder of weights; None where the encoder needs none.
    device: "auto" is CUDA where there is any.
    dtype: what its network computes in; float16 moves units by 0.1 %, bfloat16 by 1 %.
    int8: its matrix products in 8 bits, on CPUs.
    normalize_wav: clips brought to mean 0 and variance 1 first; None: as the name's models expect.
    normalize: "song" brings every dimension to mean 0 and variance 1 over all clips of a song.
    codebook: a file of centres; the id of the nearest one is stored in place of each frame.
    """

    checkpoint: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    int8: bool = False
    normalize_wav: bool | None = None
    normalize: Literal["none", "song"] = field(default="none", metadata={"neutral": "none"})
    codebook: str | None = None

    def meaning(self) -> dict[str, Any]:
        """Of what makes units that other centres are near to: all that is not the default."""
        named = {"normalize": self.normalize, "normalize_wav": self.normalize_wav}
        defaults = EncoderSettings()
        return {key: value for key, value in named.items() if value != getattr(defaults, key)}

    def options(self) -> dict[str, Any]:
        """What `load_encoder` is told beyond checkpoint and device: all that is not the default."""
        options: dict[str, Any] = {}
        if self.dtype != "float32":
            options["dtype"] = self.dtype
        if self.int8:
            options["int8"] = True
        if self.normalize_wav is not None:
            options["normalize_wav"] = self.normalize_wav
        return options


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(EncoderSettings):
    """Which encoder makes the units, and how."""

    name: str = "mfcc"


def encode_units(
    clips: Sequence[Array],
    song_of: Sequence[str],
    sample_rate: int,
    encoder: Encoder,
    cfg: EncoderSettings,
    resample_cfg: ResampleConfig,
) -> list[NDArray[np.float32]]:
    """Units of each clip, float32 (F, D), D and the frame clock being the encoder's.

    clips: (T,) each, at `sample_rate`. song_of: the song id of each; with normalize="song" all
    clips of a song must be in one call.

    Raises ValueError for a clip that the encoder refuses.
    """
    if len(clips) != len(song_of):
        raise ValueError(f"{len(clips)} clips, but songs for {len(song_of)}")
    units: list[NDArray[np.float32]] = []
    for wavs in groups_of_wavs(clips, sample_rate, encoder.sample_rate, resample_cfg):
        units += [frames.numpy() for frames in encoder.encode(wavs)]
    return _normalize(units, song_of) if cfg.normalize == "song" else units


def groups_of_wavs(
    clips: Sequence[Array], sample_rate: int, target_rate: int, resample_cfg: ResampleConfig
) -> Iterator[list[Tensor]]:
    """Clips (T,) at `target_rate`, in order, about ten minutes of audio at a time.

    A clip that resamples to nothing is one sample of silence.
    """
    import torch

    resampled = (resample(clip, sample_rate, target_rate, resample_cfg) for clip in clips)
    for group in in_groups(resampled, target_rate):
        # A clip of two samples may resample to none.
        yield [torch.tensor(wav if len(wav) else np.zeros(1), dtype=torch.float32) for wav in group]


class UnitStatistics:
    """Mean and variance of each dimension of the units of a song, which come clip by clip."""

    def __init__(self) -> None:
        self._frames = 0
        self._mean: NDArray[np.float64] | float = 0.0
        self._squares: NDArray[np.float64] | float = 0.0  # of differences from the mean, summed

    def add(self, units: NDArray[np.float32]) -> None:
        """Of a clip, (F, D). Source: Chan, Golub and LeVeque (1979)."""
        if not len(units):
            return
        wide = units.astype(np.float64)
        mean, frames = wide.mean(axis=0), self._frames + len(units)
        away = mean - self._mean
        self._squares += np.square(wide - mean).sum(axis=0)
        self._squares += np.square(away) * (self._frames * len(units) / frames)
        self._mean += away * (len(units) / frames)
        self._frames = frames

    def apply(self, units: NDArray[np.float32]) -> NDArray[np.float32]:
        """(F, D) at mean 0 and variance 1; a dimension that never changes becomes 0."""
        std = np.sqrt(self._squares / max(1, self._frames))
        # What moves by no more than float32 rounding (1e-7 of itself) is not blown up to 1.
        varies = std > 1e-6 * np.abs(self._mean)
        scale = np.where(varies, 1 / np.where(varies, std, 1.0), 0.0)
        return ((units - self._mean) * scale).astype(np.float32)


def _normalize(
    units: list[NDArray[np.float32]], song_of: Sequence[str]
) -> list[NDArray[np.float32]]:
    statistics: dict[str, UnitStatistics] = defaultdict(UnitStatistics)
    for frames, song in zip(units, song_of, strict=True):
        statistics[song].add(frames)
    return [statistics[song].apply(frames) for frames, song in zip(units, song_of, strict=True)]


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


def pack_ids(ids: NDArray[np.integer[Any]]) -> bytes:
    """(F,) ids of a codebook's centres as they lie in a shard: int16 little-endian.

    Raises OverflowError for an id that int16 cannot hold.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= 32767:
        raise OverflowError(f"ids from {ids.min()} to {ids.max()}; a shard stores 0 to 32767")
    return ids.astype("<i2").tobytes()


def unpack_ids(data: bytes) -> NDArray[np.int16]:
    """What `pack_ids` packed: int16 (F,). ValueError for an odd number of bytes."""
    if len(data) % 2:
        raise ValueError(f"{len(data)} bytes are no int16 ids")
    return np.frombuffer(data, dtype="<i2").astype(np.int16)
