"""Batches of a dataset's audio for training encoders, in an order that seed and epoch decide."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from soundfile import LibsndfileError
from torch import Tensor

from models.synthesizer.config import require_at_least
from pipeline.dataset.batch_order import BatchOrder, Indices
from pipeline.dataset.folder import open_folder
from pipeline.dataset.prefetch import stream
from pipeline.dataset.row_groups import DamagedClip, damaged_clip, read_row_groups
from pipeline.errors import UserError
from stages.flac import decode_flac
from stages.pcm import dequantise
from stages.resample import ResampleConfig, resample
from stages.types import Array

_SHUFFLE_GROUPS = 8  # row groups whose clips are mixed, and whose FLAC is in memory
_THREADS = 1
_PREFETCH = 1  # batches


@dataclass(frozen=True, kw_only=True)
class AudioDataConfig:
    """Batches of clips. batch_size: clips in a step. crop_s: seconds; longer clips are cropped."""

    split: str = "train"
    batch_size: int = 8
    crop_s: float = 10.0

    def __post_init__(self) -> None:
        require_at_least(1, "data.batch_size", self.batch_size)
        if not 0.1 <= self.crop_s <= 60:
            raise ValueError(f"data.crop_s is {self.crop_s:g}; it must lie in 0.1 to 60 seconds")


@dataclass(frozen=True)
class _Cell:
    """A clip as it lies in a shard."""

    group: int
    clip_id: str
    flac: bytes


class AudioBatches:
    """Batches of the clips of a split, resampled; each is a function of the seed and its step."""

    def __init__(
        self,
        dataset: Path,
        data: AudioDataConfig,
        *,
        sample_rate: int,
        shortest: int,
        seed: int,
        resampling: ResampleConfig,
    ) -> None:
        """Read the length of every clip.

        sample_rate: of the batches. shortest: in samples at that rate; shorter clips are left out.

        Raises: UserError: when this is not a dataset, or no clip is long enough.
        """
        self.sample_rate, self.seed, self.resampling = sample_rate, seed, resampling
        self.row_groups, rows = read_row_groups(
            open_folder(dataset), data.split, lambda _: ["num_samples"]
        )
        self.clip_rate = self.row_groups.footer.sample_rate
        num_samples = rows["num_samples"].to_numpy()
        usable = num_samples * sample_rate >= shortest * self.clip_rate
        if not usable.any():
            raise UserError(
                f"{dataset} has no clip in split '{data.split}' that is long enough for the "
                f"encoder; choose another data.split"
            )
        self.row: NDArray[np.int32] = rows["row"].to_numpy()[usable]
        self._longest = round(data.crop_s * self.clip_rate)
        self.order = BatchOrder(
            rows["group"].to_numpy()[usable],
            np.minimum(num_samples[usable], self._longest),
            batch_size=data.batch_size,
            shuffle_groups=_SHUFFLE_GROUPS,
            seed=seed,
        )

    def __len__(self) -> int:
        """Clips."""
        return len(self.row)

    def stream(self, start_step: int) -> Generator[tuple[Tensor, list[int]], None, None]:
        """Yield the clips of each step, padded (B, T), and the samples of each clip, without end.

        Raises: UserError: when a shard is damaged.
        """
        return stream(
            self.order,
            self._read,
            self._batch,
            start_step=start_step,
            threads=_THREADS,
            prefetch=_PREFETCH,
        )

    def _read(self, group: int, clips: Indices) -> list[_Cell | None]:
        table = self.row_groups.read(group, ["clip_id", "audio.bytes"])
        clip_ids, audio = table["clip_id"], table["audio"]
        return [
            _Cell(group, clip_ids[row].as_py(), audio[row]["bytes"].as_py())
            for row in self.row[clips].tolist()
        ]

    def _batch(self, step: int, _: Indices, cells: Sequence[_Cell]) -> tuple[Tensor, list[int]]:
        rng = np.random.default_rng([self.seed, step])
        wavs = [torch.from_numpy(self._decoded(cell, rng)) for cell in cells]
        return torch.nn.utils.rnn.pad_sequence(wavs, True), [len(wav) for wav in wavs]

    def _decoded(self, cell: _Cell, rng: np.random.Generator) -> Array:
        """Return a clip (T,) at `sample_rate`, cropped at random to at most `data.crop_s`."""
        subtype = self.row_groups.footer.subtype
        try:
            samples = decode_flac(cell.flac, subtype)
        except LibsndfileError as error:
            fault = DamagedClip(f"its audio does not decode: {error}")
            raise damaged_clip(self.row_groups.where(cell.group), cell.clip_id, fault) from error
        start = int(rng.integers(0, max(0, len(samples) - self._longest) + 1))
        wav = dequantise(samples[start : start + self._longest], subtype)
        return resample(wav, self.clip_rate, self.sample_rate, self.resampling)
