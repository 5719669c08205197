"""The units of a dataset as frames, one row group at a time, for datasets of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset.batch_order import Indices, epoch_bits, mix_groups
from pipeline.dataset.folder import open_folder
from pipeline.dataset.prefetch import read_ahead
from pipeline.dataset.row_groups import (
    DamagedClip,
    RowGroups,
    choose_encoder,
    damaged_clip,
    read_row_groups,
    unpack_clip_units,
)
from pipeline.dataset.schema import EncoderIdentity
from pipeline.errors import UserError

Frames = NDArray[np.float32]  # (F, D)

_SHUFFLE_GROUPS = 4  # row groups whose frames are mixed, since one has clips of few songs


@dataclass(frozen=True, kw_only=True)
class UnitDataConfig:
    """The units that `codebook` and `index` read. encoder: None: the only one in the dataset.

    speaker: None: all speakers.
    """

    encoder: str | None = None
    split: str = "train"
    speaker: str | None = None


@dataclass(frozen=True)
class UnitFrames:
    """The frames that one encoder made from the clips of a split, or from those of one speaker.

    clips: (N, 3) int32: the row group of each clip in ascending order, its row there, its frames.
    singers: (N,) dictionary array, the speaker of each clip.
    Groups below are those that have such a clip, numbered from 0.
    """

    dataset: Path
    encoder: EncoderIdentity
    row_groups: RowGroups
    clips: NDArray[np.int32]
    singers: pa.DictionaryArray
    speaker: str | None = None

    @cached_property
    def speakers(self) -> list[str]:
        return sorted(self.singers.dictionary.to_pylist())

    def of(self, speaker: str) -> UnitFrames:
        """Return the frames of one speaker. Raises: UserError: when there is no such speaker."""
        if speaker not in self.speakers:
            known = ", ".join(self.speakers[:10])
            raise UserError(f"{self.dataset} has no clips of speaker '{speaker}' (it has {known})")
        number = self.singers.dictionary.index(speaker).as_py()
        chosen = np.flatnonzero(self.singers.indices.to_numpy() == number)
        return replace(
            self,
            clips=self.clips[chosen],
            singers=pa.array([speaker] * len(chosen)).dictionary_encode(),
            speaker=speaker,
        )

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """(G + 1,) The first clip of each group, and the number of clips."""
        first = np.unique(self.clips[:, 0], return_index=True)[1]
        return np.append(first, len(self.clips))

    @cached_property
    def counts(self) -> list[int]:
        """The frames of each group."""
        frames = self.clips[:, 2].astype(np.int64)
        return list(np.add.reduceat(frames, self._starts[:-1]).tolist())

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def read(self, index: int) -> Frames:
        """Return the frames of group `index` in the order of the clips.

        Raises: UserError: when the shard is damaged.
        """
        clips = self.clips[self._starts[index] : self._starts[index + 1]]
        group = int(clips[0, 0])
        table = self.row_groups.read(group, ["clip_id", self.encoder.column])
        cells = []
        for _, row, frames in clips.tolist():
            packed = table[self.encoder.column][row].as_py()
            try:
                cells.append(unpack_clip_units(packed, frames, self.encoder))
            except DamagedClip as error:
                clip_id = table["clip_id"][row].as_py()
                raise damaged_clip(self.row_groups.where(group), clip_id, error) from error
        return np.concatenate(cells)

    def blocks(self) -> Iterator[Frames]:
        """Yield the frames of each group in order."""
        return read_ahead(self.read, range(len(self.counts)))

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[Frames]:
        """Yield all frames once in a random order: `size` at a time, the last batch smaller.

        Seed and epoch decide the order. The frames of a few row groups are in memory.
        """

        def mixes() -> Iterator[tuple[Indices, Indices]]:
            bits = epoch_bits(seed, epoch)
            return mix_groups(np.array(self.counts), size, _SHUFFLE_GROUPS, bits)

        blocks = read_ahead(self.read, (int(group) for groups, _ in mixes() for group in groups))
        rest = np.empty((0, self.encoder.dim), np.float32)
        for groups, order in mixes():
            frames = np.empty((len(order), self.encoder.dim), np.float32)
            stop = len(rest)
            frames[:stop] = rest
            for _ in groups:
                block = next(blocks)
                frames[stop : stop + len(block)] = block
                stop += len(block)
            whole = len(order) // size * size
            for start in range(0, whole, size):
                yield frames[order[start : start + size]]
            rest = frames[order[whole:]]
            del frames  # before the next ones take as much memory
        if len(rest):
            yield rest

    def sample(self, size: int, seed: int) -> Frames:
        """Return `size` different frames drawn at random; all frames if there are fewer.

        Each set of frames is equally likely. Reads only groups that have a drawn one; the memory
        is that of the sample.
        """
        parts = list(self.sampled_blocks(size, seed))
        return np.concatenate(parts) if parts else np.empty((0, self.encoder.dim), np.float32)

    def sampled_blocks(self, size: int, seed: int) -> Iterator[Frames]:
        """Yield the frames of `sample`, one group at a time."""
        bar = self._key_of_rank(size, seed)

        def read(index: int) -> Frames:
            return self.read(index)[self._keys(index, seed) <= bar]

        drawn = (i for i in range(len(self.counts)) if (self._keys(i, seed) <= bar).any())
        return read_ahead(read, drawn)

    def _keys(self, index: int, seed: int) -> NDArray[np.float64]:
        """Return a random number for each frame of a group: those with the lowest are drawn."""
        return np.random.default_rng([seed, index]).random(self.counts[index])

    def _key_of_rank(self, size: int, seed: int) -> float:
        """Return the key of the `size`-th lowest of all frames; infinite if there are fewer."""
        if size >= self.total:
            return float("inf")
        lowest = np.empty(0)
        for i in range(len(self.counts)):
            lowest = np.concatenate([lowest, self._keys(i, seed)])
            if len(lowest) > 2 * size + 65536:
                lowest = np.partition(lowest, size)[:size]
        return float(np.partition(lowest, size - 1)[size - 1])


def find_units(dataset: Path, encoder: str | None = None, split: str | None = None) -> UnitFrames:
    """Return the units of `dataset` by `encoder` in `split`; None: the only encoder, every split.

    Reads footers and narrow columns, not the units.
    Raises: UserError: when this is not a dataset, has no such encoder or split or no clips, or its
    units are ids of a codebook.
    """
    folder = open_folder(dataset)
    row_groups, rows = read_row_groups(
        folder,
        split,
        lambda footer: ("speaker", choose_encoder(footer, folder, encoder).frames_column),
    )
    if not len(rows):
        raise UserError(f"no shard of {dataset} has a clip in it")
    identity = choose_encoder(row_groups.footer, folder, encoder)
    clips = [rows[name].to_numpy() for name in ("group", "row", identity.frames_column)]
    singers = rows["speaker"].combine_chunks().dictionary_encode()
    return UnitFrames(dataset, identity, row_groups, np.stack(clips, axis=1), singers)
