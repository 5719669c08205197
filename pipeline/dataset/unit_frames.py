"""The units of a dataset as frames, a row group at a time, whatever the dataset's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.schema import EncoderIdentity
from pipeline.dataset.shards import iter_shards, read_dataset_info, read_footers
from pipeline.errors import UserError
from stages.units import unpack_units

Frames = NDArray[np.float32]  # (F, D)


@dataclass(frozen=True, kw_only=True)
class UnitDataConfig:
    """The units that `codebook` and `index` read. encoder: None: the only one in the dataset.

    speaker: None: all speakers.
    """

    encoder: str | None = None
    split: str = "train"
    speaker: str | None = None


@dataclass(frozen=True)
class RowGroup:
    """A row group of a shard: how many frames each speaker has in it."""

    shard: Path
    index: int
    frames_of: dict[str, int]


@dataclass(frozen=True)
class UnitFrames:
    """The frames that one encoder made of the clips of a split; of one speaker if one is set."""

    dataset: Path
    encoder: EncoderIdentity
    groups: Sequence[RowGroup]
    speaker: str | None = None

    @cached_property
    def speakers(self) -> list[str]:
        return sorted({name for group in self.groups for name in group.frames_of})

    def of(self, speaker: str) -> UnitFrames:
        """Those of `speaker` alone. Raises UserError where there is no such speaker."""
        if speaker not in self.speakers:
            known = ", ".join(self.speakers[:10])
            raise UserError(f"{self.dataset} has no clips of speaker '{speaker}' (it has {known})")
        groups = [group for group in self.groups if speaker in group.frames_of]
        return replace(self, groups=groups, speaker=speaker)

    @cached_property
    def counts(self) -> list[int]:
        """Frames in each group."""
        if self.speaker is not None:
            return [group.frames_of[self.speaker] for group in self.groups]
        return [sum(group.frames_of.values()) for group in self.groups]

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def read(self, index: int) -> Frames:
        """The frames of group `index`, in the order of the clips.

        Raises: UserError when the shard is not what its columns say.
        """
        group = self.groups[index]
        columns = [self.encoder.column, "speaker"]
        try:
            with pq.ParquetFile(group.shard) as file:
                table = file.read_row_group(group.index, columns=columns, use_threads=False)
            if self.speaker is not None:
                table = table.filter(pc.field("speaker") == self.speaker)
            cells = [unpack_units(cell, self.encoder.dim) for cell in _cells(table, columns[0])]
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{group.shard} is damaged: {error}") from error
        frames = np.concatenate(cells)
        if len(frames) != self.counts[index]:
            raise UserError(
                f"{group.shard} is damaged: row group {group.index} has {len(frames)} frames of "
                f"{self.encoder.name} where its columns state {self.counts[index]}"
            )
        return frames

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[Frames]:
        """Frames of one group after the other; order: which groups, by index."""
        for index in order if order is not None else range(len(self.groups)):
            yield self.read(index)

    def batches(self, rng: np.random.Generator, size: int, mixed: int = 32768) -> Iterator[Frames]:
        """All frames once in an order that `rng` mixes: `size` at a time, the last batch smaller.

        Groups come in random order, and the frames of as many as make `mixed` are shuffled
        together, since those of one group are of few songs.
        """
        held: list[Frames] = []
        for index in rng.permutation(len(self.groups)):
            held.append(self.read(int(index)))
            if sum(map(len, held)) >= mixed:
                yield from _shuffled(held, rng, size)
                held = []
        if held:
            yield from _shuffled(held, rng, size)

    def sample(self, size: int, seed: int) -> Frames:
        """`size` different frames, each set of them equally likely; all frames if there are fewer.

        Reads only groups that have a drawn one. The memory is that of the sample.
        """
        bar = self._key_of_rank(size, seed)
        parts = [
            self.read(i)[keys <= bar]
            for i in range(len(self.groups))
            if ((keys := self._keys(i, seed)) <= bar).any()
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.encoder.dim), np.float32)

    def sampled_blocks(self, size: int, seed: int) -> Iterator[Frames]:
        """The frames of `sample`, a group at a time."""
        bar = self._key_of_rank(size, seed)
        for i in range(len(self.groups)):
            drawn = self._keys(i, seed) <= bar
            if drawn.any():
                yield self.read(i)[drawn]

    def _keys(self, index: int, seed: int) -> NDArray[np.float64]:
        """A random number for each frame of a group: those with the lowest are drawn."""
        return np.random.default_rng([seed, index]).random(self.counts[index])

    def _key_of_rank(self, size: int, seed: int) -> float:
        """The key of the `size`-th lowest of all frames; infinite if there are fewer."""
        if size >= self.total:
            return float("inf")
        lowest = np.empty(0)
        for i in range(len(self.groups)):
            lowest = np.concatenate([lowest, self._keys(i, seed)])
            if len(lowest) > 2 * size + 65536:
                lowest = np.partition(lowest, size)[:size]
        return float(np.partition(lowest, size - 1)[size - 1])


def find_units(dataset: Path, encoder: str | None = None, split: str | None = None) -> UnitFrames:
    """The units of `dataset` by `encoder`, of `split`; None is the only encoder, and every split.

    Reads footers and the narrow columns, not the units.
    Raises: UserError for what is no dataset, for an encoder or split that it does not have, and
    for units that are ids of a codebook already.
    """
    read_dataset_info(dataset)
    shards = [path for path in iter_shards(dataset) if split in (None, split_of(path))]
    if not shards:
        if split is not None and iter_shards(dataset):
            have = ", ".join(sorted({split_of(path) for path in iter_shards(dataset)}))
            raise UserError(f"{dataset} has no split '{split}' (it has {have})")
        raise UserError(f"{dataset} has no shards yet; run `extract` first")
    identity = _identity(dataset, shards, encoder)
    groups = [group for path in shards for group in _groups(path, identity)]
    if not groups:
        raise UserError(f"no shard of {dataset} has a clip in it")
    return UnitFrames(dataset, identity, groups)


def split_of(shard: Path) -> str:
    """The split in a shard's name, `train-00007.parquet`."""
    return shard.stem.rpartition("-")[0]


def _identity(dataset: Path, shards: list[Path], name: str | None) -> EncoderIdentity:
    """What all shards say of the encoder `name`."""
    found: EncoderIdentity | None = None
    for path, footer in read_footers(shards):
        if isinstance(footer, UserError):
            raise footer
        by_name = {encoder.name: encoder for encoder in footer.encoders}
        if name is None and len(by_name) != 1:
            raise UserError(f"{dataset} has units of {', '.join(by_name)}; name one with --encoder")
        wanted = name or next(iter(by_name))
        if wanted not in by_name:
            raise UserError(
                f"{path} has no units of '{wanted}'; --encoder can be {', '.join(by_name)}"
            )
        if found is not None and by_name[wanted] != found:
            raise UserError(f"{path} has other units of '{wanted}' than the shards before it")
        found = by_name[wanted]
    assert found is not None
    if found.dtype != "float16":
        raise UserError(
            f"the units of '{found.name}' in {dataset} are ids of a codebook ({found.dtype}); "
            f"this needs a dataset that was extracted without one"
        )
    return found


def _groups(shard: Path, encoder: EncoderIdentity) -> Iterator[RowGroup]:
    columns = ["speaker", encoder.frames_column]
    try:
        with pq.ParquetFile(shard) as file:
            for index in range(file.num_row_groups):
                table = file.read_row_group(index, columns=columns, use_threads=False)
                rows = zip(*(_cells(table, name) for name in columns), strict=True)
                frames_of: dict[str, int] = {}
                for speaker, frames in rows:
                    frames_of[speaker] = frames_of.get(speaker, 0) + frames
                yield RowGroup(shard, index, frames_of)
    except pa.ArrowException as error:
        raise UserError(f"{shard} is damaged: {error}") from error


def _cells(table: pa.Table, column: str) -> list[Any]:
    return list(table[column].to_pylist())


def _shuffled(held: list[Frames], rng: np.random.Generator, size: int) -> Iterator[Frames]:
    frames = np.concatenate(held)
    held.clear()
    order = rng.permutation(len(frames))
    for start in range(0, len(frames), size):
        yield frames[order[start : start + size]]
