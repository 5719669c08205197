"""Units: encoding clips as sequences of content vectors, and packing them for a shard."""

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
    """Settings of an encoder and of the post-processing of its units.

    checkpoint: file or folder of weights; None where the encoder needs none.
    device: "auto" is CUDA where available.
    dtype: precision of the network; float16 changes units by 0.1 %, bfloat16 by 1 %.
    int8: run matrix products in 8 bits, on CPUs.
    normalize_wav: normalise clips to mean 0 and variance 1 first; None: the default of the name.
    normalize: "song" normalises every dimension to mean 0 and variance 1 over the clips of a song.
    codebook: file of centres; the id of the nearest one is stored in place of each frame.
    """

    checkpoint: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    int8: bool = False
    normalize_wav: bool | None = None
    normalize: Literal["none", "song"] = field(default="none", metadata={"neutral": "none"})
    codebook: str | None = None

    def meaning(self) -> dict[str, Any]:
        """Non-default settings that change unit values; a codebook depends on them."""
        named = {"normalize": self.normalize, "normalize_wav": self.normalize_wav}
        defaults = EncoderSettings()
        return {key: value for key, value in named.items() if value != getattr(defaults, key)}

    def options(self) -> dict[str, Any]:
        """Non-default options for `load_encoder`, beyond checkpoint and device."""
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
    """Settings of the encoder that makes the units, with its name."""

    name: str = "mfcc"


def encode_units(
    clips: Sequence[Array],
    song_of: Sequence[str],
    sample_rate: int,
    encoder: Encoder,
    cfg: EncoderSettings,
    resample_cfg: ResampleConfig,
) -> list[NDArray[np.float32]]:
    """Encode each clip as units, float32 (F, D); the encoder defines D and the frame clock.

    clips: (T,) each, at `sample_rate`. song_of: the song id of each; with normalize="song" all
    clips of a song must be in one call.

    Raises: ValueError: when the encoder refuses a clip.
    """
    if len(clips) != len(song_of):
        raise ValueError(f"{len(clips)} clips, but {len(song_of)} song ids")
    units: list[NDArray[np.float32]] = []
    for wavs in groups_of_wavs(clips, sample_rate, encoder.sample_rate, resample_cfg):
        units += [frames.numpy() for frames in encoder.encode(wavs)]
    return _normalize(units, song_of) if cfg.normalize == "song" else units


def groups_of_wavs(
    clips: Sequence[Array], sample_rate: int, target_rate: int, resample_cfg: ResampleConfig
) -> Iterator[list[Tensor]]:
    """Yield the clips (T,) at `target_rate`, in order, in groups of about ten minutes of audio.

    A clip that resamples to nothing becomes one sample of silence.
    """
    import torch

    resampled = (resample(clip, sample_rate, target_rate, resample_cfg) for clip in clips)
    for group in in_groups(resampled, target_rate):
        # A clip of two samples can resample to none.
        yield [torch.tensor(wav if len(wav) else np.zeros(1), dtype=torch.float32) for wav in group]


class UnitStatistics:
    """Running mean and variance of each dimension of the units of a song."""

    def __init__(self) -> None:
        self._frames = 0
        self._mean: NDArray[np.float64] | float = 0.0
        self._squares: NDArray[np.float64] | float = 0.0  # of differences from the mean, summed

    def add(self, units: NDArray[np.float32]) -> None:
        """Add the units (F, D) of a clip. Source: Chan, Golub and LeVeque (1979)."""
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
        """Normalise units (F, D) to mean 0 and variance 1; a constant dimension becomes 0."""
        std = np.sqrt(self._squares / max(1, self._frames))
        # A dimension that varies by float32 rounding only (1e-7 of its value) counts as constant.
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
    """Pack units (F, D) for a shard: float16 little-endian, row by row.

    Raises: OverflowError: when a value exceeds float16 (the message names it).
    """
    with np.errstate(over="ignore"):
        half = units.astype("<f2")
    if not np.isfinite(half).all():
        frame, dim = np.argwhere(~np.isfinite(half))[0]
        raise OverflowError(
            f"units have {units[frame, dim]:g} in dimension {dim} of frame {frame}; "
            f"a shard stores float16, whose largest value is 65504"
        )
    return half.tobytes()


def unpack_units(data: bytes, dim: int) -> NDArray[np.float32]:
    """Unpack the bytes of `pack_units` to float32 (F, dim).

    Raises: ValueError: when the number of bytes does not fit `dim`.
    """
    if dim < 1 or len(data) % (2 * dim):
        raise ValueError(f"{len(data)} bytes are not float16 frames of width {dim}")
    return np.frombuffer(data, dtype="<f2").reshape(-1, dim).astype(np.float32)


def pack_ids(ids: NDArray[np.integer[Any]]) -> bytes:
    """Pack codebook ids (F,) for a shard: int16 little-endian.

    Raises: OverflowError: when an id exceeds int16.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= 32767:
        raise OverflowError(f"ids from {ids.min()} to {ids.max()}; a shard stores 0 to 32767")
    return ids.astype("<i2").tobytes()


def unpack_ids(data: bytes) -> NDArray[np.int16]:
    """Unpack the bytes of `pack_ids` to int16 (F,).

    Raises: ValueError: when the number of bytes is odd.
    """
    if len(data) % 2:
        raise ValueError(f"{len(data)} bytes are not int16 ids")
    return np.frombuffer(data, dtype="<i2").astype(np.int16)
