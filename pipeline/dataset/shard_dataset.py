"""Shards as training examples, in an order that seed and epoch decide, starting at any step."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from models.synthesizer.batch import Batch
from models.synthesizer.step import Totals
from pipeline.dataset.batch_order import BatchOrder, Indices, held_out_songs
from pipeline.dataset.clip_index import ClipIndex, extraction_of, pitch_of_speakers, read_index
from pipeline.dataset.data_config import DataConfig
from pipeline.dataset.examples import (
    Cell,
    Chance,
    Example,
    collate,
    draw,
    make_example,
)
from pipeline.dataset.folder import open_folder
from pipeline.dataset.prefetch import stream
from pipeline.dataset.row_groups import DamagedClip, damaged_clip
from pipeline.errors import UserError

Subset = Literal["train", "validation", "all"]


class Share(NamedTuple):
    """A worker's part of a global batch, padded to the longest clip of the global batch."""

    batch: Batch
    totals: Totals  # of the global batch
    epoch: int


class ShardDataset:
    """The clips of a dataset's split, one by one or as an endless stream of batches.

    len(dataset), dataset[i]: a map-style dataset of PyTorch, clips in the order of the shards.
    batches(): for trainers; several times as fast, since row groups are read once.
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
        """Read footers and narrow columns: seconds for a million clips.

        path: a folder, a URI as `s3://bucket/dataset`, or a path on `filesystem`.
        encoder: which units to read; None: `data.encoder`, or the only one.
        subset: "validation" has the held-out songs, which may be none; their clips are not
        augmented. "train" has the others.

        Raises: UserError: when this is not a dataset, or one that cannot be trained from.
        """
        self.data = data or DataConfig()
        self.seed = seed
        self.subset = subset
        self.folder = open_folder(path, filesystem)
        index = read_index(
            self.folder, self.data.split, encoder or self.data.encoder, self.data.min_frames
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
        """Return clip i as it is in the first epoch."""
        return self.example(i)

    def example(self, i: int, epoch: int = 0) -> Example:
        """Return clip i as it is in `epoch`.

        A whole row group is read; the last one is kept, for the neighbouring clips.

        Raises: IndexError: when there is no clip i; UserError: when the shard is damaged.
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
        return extraction_of(self.folder, self.identity.encoder.name)

    @cached_property
    def pitch_hz(self) -> dict[str, float]:
        """The average pitch of each speaker who sings."""
        return pitch_of_speakers(self.folder, self.data.split)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @cached_property
    def order(self) -> BatchOrder:
        """The clips of each step of every epoch."""
        frames = self.index.num_samples // self.identity.hop_length
        return BatchOrder(
            self.index.group,
            np.minimum(frames, self.data.max_frames),
            batch_size=self.data.batch_size,
            shuffle_groups=self.data.shuffle_groups,
            seed=self.seed,
        )

    def batches(
        self, start_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Generator[Share, None, None]:
        """Yield worker `rank`'s share of each global batch from `start_step` on, without end.

        Step and seed alone decide what is in a global batch; a share is its clips rank, rank +
        world_size, ... Closing or dropping the iterator ends its threads.

        Raises: UserError: when the number of workers does not divide data.batch_size, and, while
        reading, when a shard is damaged.
        """
        if self.data.batch_size % world_size:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}, which {world_size} workers cannot "
                f"share evenly; make it a multiple of {world_size}"
            )
        if not len(self):
            raise UserError(f"{self.folder.name} has no clips for '{self.subset}'")

        def make(step: int, clips: Indices, cells: Sequence[Cell]) -> Share:
            epoch = step // self.steps_per_epoch
            return self._share(epoch, clips.tolist(), cells, slice(rank, None, world_size))

        return stream(
            self.order,
            self._read_cells,
            make,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
            threads=self.data.loader_threads,
            prefetch=self.data.prefetch,
        )

    def _read_cells(self, group: int, clips: Indices) -> list[Cell | None]:
        table = self._read_group(group)
        return [self._cell(table, int(clip)) for clip in clips]

    def _share(self, epoch: int, clips: list[int], cells: Sequence[Cell], mine: slice) -> Share:
        """Return the part `mine` of the batch of `clips`. cells: of that part."""
        chances = [self._chance(clip, epoch) for clip in clips]
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
            raise damaged_clip(self._where(clip), cell.clip_id, error) from error

    def _read_group(self, group: int) -> pa.Table:
        encoder = self.identity.encoder
        columns = ["clip_id", "audio.bytes", "f0", encoder.column, encoder.frames_column]
        return self.index.row_groups.read(group, columns)

    def _cell(self, table: pa.Table, clip: int) -> Cell:
        """Return the columns of a clip. table: its row group."""
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
        return self.index.row_groups.where(int(self.index.group[clip]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _subset(index: ClipIndex, subset: Subset, validation: float, seed: int) -> ClipIndex:
    if subset == "all":
        return index
    singers = index.singers()
    held_out = held_out_songs(list(singers), list(singers.values()), validation, seed)
    is_held_out = np.array([song in held_out for song in index.song_ids])
    return index.take(is_held_out[index.song] == (subset == "validation"))
