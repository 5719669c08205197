"""Shards as training examples: in an order that seed and epoch decide, from any step on."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from models.synthesizer.batch import Batch
from models.synthesizer.step import Totals
from pipeline.dataset.batch_order import Clips, epoch_order, held_back
from pipeline.dataset.clip_index import (
    ClipIndex,
    extraction_of,
    open_folder,
    pitch_of_speakers,
    read_index,
)
from pipeline.dataset.examples import (
    Cell,
    Chance,
    DamagedClip,
    DataConfig,
    Example,
    collate,
    draw,
    make_example,
)
from pipeline.dataset.prefetch import EpochPlan, Visit, plan_epoch, stream
from pipeline.errors import UserError

Subset = Literal["train", "validation", "all"]


class Share(NamedTuple):
    """What a worker gets of a global batch, padded to the longest clip of all of it."""

    batch: Batch
    totals: Totals  # of the global batch
    epoch: int


class ShardDataset:
    """The clips of a dataset's split, one by one or as an endless stream of batches.

    len(dataset), dataset[i]: a map-style dataset of PyTorch, clips in the order of the shards.
    batches(): what a trainer wants, several times as fast, since row groups are read once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        encoder: str | None = None,
        *,
        data: DataConfig | None = None,
        seed: int = 0,
        subset: Subset = "train",
        filesystem: pafs.FileSystem | None = None,
    ) -> None:
        """Reads footers and narrow columns: seconds for a million clips.

        path: a folder, a URI as `s3://bucket/dataset`, or a path on `filesystem`.
        encoder: whose units; None: `data.encoder`, or the only one.
        subset: "validation" are the songs that are held back, which may be none; clips of theirs
        are not augmented. "train" are the others.

        Raises: UserError for what is no dataset, or none that can be trained from.
        """
        self.data = data or DataConfig()
        self.seed = seed
        self.subset = subset
        folder = open_folder(path, filesystem)
        index = read_index(
            folder, self.data.split, encoder or self.data.encoder, self.data.min_frames
        )
        self.identity = index.identity
        self.left_out = index.left_out
        self.index = _subset(index, subset, self.data.validation, seed)
        plain = replace(self.data, volume_augment=False, key_shift=0.0)
        self._augmentation = plain if subset == "validation" else self.data
        self._last: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        """Clips."""
        return len(self.index)

    def __getitem__(self, i: int) -> Example:
        """Clip i as it comes in the first epoch."""
        return self.example(i)

    def example(self, i: int, epoch: int = 0) -> Example:
        """Clip i as it comes in `epoch`. Raises IndexError, and UserError for a damaged shard.

        Of a shard a row group is read at once; the last one is kept, for the clips beside it.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        group = int(self.index.group[i])
        last = self._last
        if last is None or last[0] != group:
            last = self._last = (group, self._read_group(group))
        cell = self._cell(last[1], i)
        return self._example(i, cell, self._chance(i, epoch))

    @cached_property
    def extraction(self) -> dict[str, Any] | None:
        """The settings by section that made the clips and their units; None: not stated."""
        return extraction_of(self.index.folder, self.identity.encoder.name)

    @cached_property
    def pitch_hz(self) -> dict[str, float]:
        """Hz in the middle of what each speaker sings."""
        return pitch_of_speakers(self.index)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self) // self.data.batch_size)

    def batches(
        self, start_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Generator[Share, None, None]:
        """Worker `rank`'s share of each global batch from `start_step` on, through all epochs.

        Step and seed alone decide what is in a global batch; a share is its clips rank, rank +
        world_size, ... Close the iterator (or drop it) to end its threads.

        Raises: UserError for a number of workers that does not divide data.batch_size, and, as it
        is read, for a damaged shard.
        """
        if self.data.batch_size % world_size:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}, which {world_size} workers cannot "
                f"share evenly; make it a multiple of {world_size}"
            )
        if not len(self):
            raise UserError(f"{self.index.folder.name} has no clips for '{self.subset}'")
        order = lru_cache(3)(self.order)

        def plan(epoch: int) -> EpochPlan:
            passed = max(0, start_step - epoch * self.steps_per_epoch)
            return self._plan(order(epoch), epoch, passed, rank, world_size)

        return stream(
            lru_cache(3)(plan),
            self._read_visit,
            lambda step, cells: self._share(order, step, cells, rank, world_size),
            start_step=start_step,
            steps_per_epoch=self.steps_per_epoch,
            clips_per_step=self.data.batch_size // world_size,
            room=self._room(world_size),
            threads=self.data.loader_threads,
            prefetch=self.data.prefetch,
        )

    def order(self, epoch: int) -> Clips:
        """The clips of each step of `epoch`, (steps, batch_size)."""
        frames = self.index.num_samples // self.identity.hop_length
        _, starts = np.unique(self.index.group, return_index=True)
        return epoch_order(
            np.append(starts, len(self)),
            np.minimum(frames, self.data.max_frames),
            batch_size=self.data.batch_size,
            shuffle_groups=self.data.shuffle_groups,
            seed=self.seed,
            epoch=epoch,
        )

    def _plan(self, order: Clips, epoch: int, passed: int, rank: int, world_size: int) -> EpochPlan:
        """What worker `rank` reads in an epoch of which `passed` steps are done."""
        again = np.arange(order.size).reshape(order.shape) >= len(self)
        share = np.s_[passed:, rank::world_size]
        clips = order[share].ravel()
        first = passed * (self.data.batch_size // world_size)
        groups = self.index.group[clips].astype(np.int64)
        return plan_epoch(epoch, clips, groups, again[share].ravel(), first)

    def _room(self, world_size: int) -> int:
        """A worker's part of the clips of `shuffle_groups` row groups."""
        largest = int(np.unique(self.index.group, return_counts=True)[1].max())
        return -(-self.data.shuffle_groups * largest // world_size)

    def _read_visit(self, visit: Visit) -> list[Cell | None]:
        table = self._read_group(visit.group)
        return [self._cell(table, int(clip)) for clip in visit.clips]

    def _share(
        self,
        order: Callable[[int], Clips],
        step: int,
        cells: Sequence[Cell],
        rank: int,
        world_size: int,
    ) -> Share:
        """cells: of the share's clips."""
        epoch, at = divmod(step, self.steps_per_epoch)
        clips = order(epoch)[at].tolist()
        chances = [self._chance(clip, epoch) for clip in clips]
        mine = slice(rank, None, world_size)
        examples = [
            self._example(clip, cell, chance)
            for clip, cell, chance in zip(clips[mine], cells, chances[mine], strict=True)
        ]
        frames = [chance.frames for chance in chances]
        return Share(collate(examples, max(frames)), Totals(len(clips), sum(frames)), epoch)

    def _chance(self, clip: int, epoch: int) -> Chance:
        return draw(
            self.index.clip_ids[clip].as_py(),
            int(self.index.num_samples[clip]),
            self.seed,
            epoch,
            self.identity,
            self._augmentation,
        )

    def _example(self, clip: int, cell: Cell, chance: Chance) -> Example:
        speaker = int(self.index.speaker[clip])
        try:
            return make_example(cell, chance, speaker, self.identity, self.data)
        except DamagedClip as error:
            raise UserError(
                f"{self._where(clip)} is damaged: {cell.clip_id}: {error}; `verify` finds all "
                f"damage, and `extract` writes a shard that was deleted anew"
            ) from error

    def _read_group(self, group: int) -> pa.Table:
        encoder = self.identity.encoder
        columns = ["clip_id", "audio.bytes", "f0", encoder.column, encoder.frames_column]
        shard = self.index.shards[self.index.shard_of[group]]
        with self.index.folder.open_shard(shard) as file:
            number = int(self.index.number_of[group])
            return file.read_row_group(number, columns=columns, use_threads=False)

    def _cell(self, table: pa.Table, clip: int) -> Cell:
        """table: the row group of the clip."""
        row, encoder = int(self.index.row[clip]), self.identity.encoder
        clip_id = table["clip_id"][row].as_py()
        if clip_id != self.index.clip_ids[clip].as_py():
            raise UserError(f"{self._where(clip)} was changed while it was read; start again")
        return Cell(
            clip_id=clip_id,
            flac=table["audio"][row]["bytes"].as_py(),
            f0=np.array(table["f0"][row].values, np.float32),
            units=table[encoder.column][row].as_py(),
            unit_frames=table[encoder.frames_column][row].as_py(),
        )

    def _where(self, clip: int) -> str:
        """The shard's name."""
        index = self.index
        return index.folder.where(index.shards[index.shard_of[index.group[clip]]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _subset(index: ClipIndex, subset: Subset, validation: float, seed: int) -> ClipIndex:
    if subset == "all":
        return index
    singers = index.singers()
    held = held_back(list(singers), list(singers.values()), validation, seed)
    is_held = np.array([song in held for song in index.song_ids])
    return index.take(is_held[index.song] == (subset == "validation"))
