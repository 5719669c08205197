"""Row groups of a dataset: their order, their columns and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.folder import open_folder
from pipeline.dataset.row_groups import (
    DamagedClip,
    choose_encoder,
    read_row_groups,
    unpack_clip_units,
)
from pipeline.dataset.schema import EncoderIdentity
from pipeline.dataset.shards import iter_shards
from pipeline.errors import UserError
from tests.helpers.training_data import write_dataset


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 40 clips: row groups of 32 and 8."""
    return write_dataset(
        tmp_path_factory.mktemp("many"), clips=20, shards=2, seconds=(0.2, 0.3), sample_rate=8000
    )


def test_rows_come_with_the_place_to_read_them_from(many: Path) -> None:
    groups, rows = read_row_groups(open_folder(many), "train", lambda _: ["clip_id"])
    assert len(groups) == 4 and groups.shards == ("train-00000.parquet", "train-00001.parquet")
    assert np.bincount(rows["group"].to_numpy()).tolist() == [32, 8, 32, 8]
    whole = [pq.read_table(shard, columns=["clip_id"])["clip_id"] for shard in iter_shards(many)]
    expected = [clip for column in whole for clip in column.to_pylist()]
    assert rows["clip_id"].to_pylist() == expected
    for clip_id, group, row in zip(*(rows[name].to_pylist() for name in rows.column_names),
                                   strict=True):  # fmt: skip
        if row in (0, 7):
            table = groups.read(group, ["clip_id", "audio.bytes"])
            assert table["clip_id"][row].as_py() == clip_id
            assert table["audio"][row].as_py().keys() == {"bytes"}
    assert groups.where(2) == f"{many}/data/train-00001.parquet"


def test_a_column_that_is_not_there_is_named(many: Path) -> None:
    with pytest.raises(UserError, match=r"train-0000\d\.parquet .*: it has no column x;"):
        read_row_groups(open_folder(many), None, lambda _: ["clip_id", "x"])
    groups, _ = read_row_groups(open_folder(many), None, lambda footer: ["speaker"])
    with pytest.raises(UserError, match=r"train-00001\.parquet .*: it has no column audio\.byte;"):
        groups.read(3, ["audio.byte"])


@pytest.mark.parametrize("column", ["audio", "units_mfcc", "f0"])
def test_a_damaged_page_is_refused_by_the_name_of_its_shard(
    many: Path, tmp_path: Path, column: str
) -> None:
    copy = Path(shutil.copytree(many, tmp_path / "copy"))
    shard = iter_shards(copy)[1]
    with pq.ParquetFile(shard) as file:
        group = file.metadata.row_group(0)
        chunks = [group.column(i) for i in range(group.num_columns)]
    chunk = next(c for c in chunks if c.path_in_schema.startswith(column))
    content = bytearray(shard.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    groups, _ = read_row_groups(open_folder(copy), None, lambda _: ["speaker"])
    with pytest.raises(UserError, match=r"data/train-00001\.parquet cannot be read: "):
        groups.read(2, [column])
    assert len(groups.read(3, [column])) == 8


def test_units_of_another_width_are_damage() -> None:
    encoder = EncoderIdentity("mfcc", 3, "float16", 50.0, None)
    frames = np.arange(12, dtype="<f2").reshape(4, 3)
    assert np.array_equal(unpack_clip_units(frames.tobytes(), 4, encoder), frames)
    for count, packed in ((3, frames.tobytes()), (0, b""), (4, frames.tobytes()[:-1])):
        with pytest.raises(DamagedClip, match=rf"bytes, which is not {count} frames of width 3"):
            unpack_clip_units(packed, count, encoder)


def test_an_encoder_is_chosen_by_name(many: Path) -> None:
    folder = open_folder(many)
    footer = read_row_groups(folder, None, lambda _: ["speaker"])[0].footer
    assert choose_encoder(footer, folder, None) == choose_encoder(footer, folder, "mfcc")
    with pytest.raises(UserError, match=r"no units of 'whisper'; data\.encoder can be mfcc"):
        choose_encoder(footer, folder, "whisper")
