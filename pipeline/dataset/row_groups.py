"""The row groups of a dataset: which shards they lie in, and reading columns of one of them.

The trainer, `distill`, `codebook`, `index` and `purity` read clips through this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.folder import DatasetFolder
from pipeline.dataset.schema import EncoderIdentity
from pipeline.dataset.shards import Footer
from pipeline.errors import UserError
from stages.units import unpack_units

_READERS = 16  # threads that read footers; they mostly wait for the storage
_SAME = ("sample_rate", "hop_length", "encoders", "f0_method", "fingerprint")  # in all footers


class DamagedClip(Exception):
    """The columns of a clip contradict each other, or do not decode."""


def damaged_clip(shard: str, clip_id: str, error: Exception) -> UserError:
    """Return the error to show for a damaged clip. shard: its name for messages."""
    return UserError(
        f"{shard} is damaged: {clip_id}: {error}; `cantor verify` lists all damage. To rebuild a "
        f"damaged shard, delete it and run `cantor extract` again"
    )


@dataclass(frozen=True)
class RowGroups:
    """The row groups of a split, numbered through all of its shards.

    footer: that of the first shard; the others have the same sample rate, encoders and settings.
    """

    folder: DatasetFolder
    footer: Footer
    shards: tuple[str, ...]
    shard_of: NDArray[np.int32]  # (G,) place in shards
    number_of: NDArray[np.int32]  # (G,) number within the shard

    def __len__(self) -> int:
        return len(self.shard_of)

    def where(self, group: int) -> str:
        """Return the name of the shard of a row group, for messages."""
        return self.folder.where(self.shards[self.shard_of[group]])

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of a row group; a field of a struct is a column too: "audio.bytes".

        Raises: UserError: when the shard is damaged or lacks a column.
        """
        with self.folder.open_shard(self.shards[self.shard_of[group]]) as file:
            return _read(file, columns, int(self.number_of[group]))


def read_row_groups(
    folder: DatasetFolder,
    split: str | None,
    columns: Callable[[Footer], Sequence[str]],
) -> tuple[RowGroups, pa.Table]:
    """Return the row groups of a split and, for each of their rows in order, some narrow columns.

    split: None is every split. columns: chosen by the footer of each shard. The table also has the
    columns `group` (number of the row group) and `row` (within the row group), int32.

    Raises: UserError: when this is not a dataset, has no such split, or a shard is damaged or was
    made with other settings than the first.
    """
    folder.read_info()
    names = folder.shards(split)
    with ThreadPoolExecutor(_READERS) as pool:
        shards = list(pool.map(lambda name: _read_shard(folder, name, columns), names))
    _require_same(folder, shards)
    groups = np.array([len(shard.sizes) for shard in shards])
    sizes = np.concatenate([shard.sizes for shard in shards]).astype(np.int64)
    firsts = np.cumsum(sizes) - sizes  # the first row of each group
    row_groups = RowGroups(
        folder,
        shards[0].footer,
        tuple(names),
        np.repeat(np.arange(len(names), dtype=np.int32), groups),
        np.concatenate([np.arange(count, dtype=np.int32) for count in groups]),
    )
    rows = pa.concat_tables([shard.rows for shard in shards])
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    row = (np.arange(len(group)) - firsts[group]).astype(np.int32)
    return row_groups, rows.append_column("group", pa.array(group)).append_column(
        "row", pa.array(row)
    )


def choose_encoder(footer: Footer, folder: DatasetFolder, name: str | None) -> EncoderIdentity:
    """Return the encoder `name` of a shard; None: its only one.

    Raises: UserError: when there is no such encoder, or its units are ids of a codebook.
    """
    by_name = {encoder.name: encoder for encoder in footer.encoders}
    known = ", ".join(by_name)
    if name is None and len(by_name) != 1:
        raise UserError(f"{folder.name} has units of {known}; choose one with data.encoder")
    encoder = by_name.get(name or next(iter(by_name)))
    if encoder is None:
        raise UserError(f"{folder.name} has no units of '{name}'; data.encoder can be {known}")
    if encoder.dtype != "float16":
        raise UserError(
            f"the units of '{encoder.name}' in {folder.name} are ids of a codebook "
            f"({encoder.dtype}); `extract --from {folder.name} NEW` without a codebook makes a "
            f"dataset of the units themselves"
        )
    return encoder


def unpack_clip_units(packed: bytes, frames: int, encoder: EncoderIdentity) -> NDArray[np.float32]:
    """Return the units (F, D) of a clip. Raises: DamagedClip: when they are not `frames` of D."""
    if len(packed) != 2 * encoder.dim * frames or not frames:
        raise DamagedClip(
            f"its units have {len(packed)} bytes, which is not {frames} frames of width "
            f"{encoder.dim}"
        )
    return unpack_units(packed, encoder.dim)


@dataclass(frozen=True)
class _Shard:
    """The footer of a shard, the sizes of its row groups and the narrow columns of its rows."""

    name: str
    footer: Footer
    sizes: list[int]
    rows: pa.Table


def _read_shard(
    folder: DatasetFolder, name: str, columns: Callable[[Footer], Sequence[str]]
) -> _Shard:
    with folder.open_shard(name) as file:
        metadata = file.metadata.metadata or {}
        if b"cantor" not in metadata:
            raise UserError(
                f"{folder.where(name)} has no 'cantor' metadata: it is not a Cantor shard; "
                f"remove it from the folder"
            )
        footer = Footer.from_json(metadata[b"cantor"].decode())
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return _Shard(name, footer, sizes, _read(file, columns(footer)))


def _read(file: pq.ParquetFile, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Return columns of a row group, or of the whole file."""
    paths = {file.schema.column(i).path for i in range(len(file.schema))}
    for name in columns:  # which pyarrow would leave out in silence
        if not any(path == name or path.startswith(f"{name}.") for path in paths):
            raise ValueError(f"it has no column {name}")
    if group is None:
        return file.read(list(columns), use_threads=False)
    return file.read_row_group(group, list(columns), use_threads=False)


def _require_same(folder: DatasetFolder, shards: Sequence[_Shard]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        for name in _SAME:
            expected, actual = (getattr(each.footer, name) for each in (first, shard))
            if actual != expected:
                raise UserError(
                    f"{folder.where(shard.name)} does not belong to {first.name}: its {name} is "
                    f"{_in_words(actual)}, not {_in_words(expected)}; keep the shards of one "
                    f"extraction in a folder"
                )


def _in_words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{e.name} ({e.dim} {e.dtype}, {e.checkpoint_sha256})" for e in value)
    return str(value)
