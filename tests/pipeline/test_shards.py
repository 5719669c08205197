"""The format as other programs see it: each reader users have, types intact."""

from __future__ import annotations

import io
import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from pipeline.errors import UserError
from pipeline.shards import commit_file, iter_shards, read_footer, shard_schema


@pytest.fixture(scope="module")
def clips(dataset: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in iter_shards(dataset))


def test_one_shard_has_no_clips_and_no_row_groups(dataset: Path) -> None:
    empty = [p for p in iter_shards(dataset) if pq.read_metadata(p).num_rows == 0]
    assert len(empty) == 1
    assert pq.read_metadata(empty[0]).num_row_groups == 0
    (entry,) = read_footer(empty[0]).ledger
    assert (entry.status, entry.reason) == ("filtered", "silent")


def test_every_shard_has_the_schema_and_both_metadata(dataset: Path) -> None:
    for path in iter_shards(dataset):
        footer = read_footer(path)
        schema = pq.read_schema(path)
        assert schema.equals(shard_schema(footer.encoders, footer.sample_rate))
        assert set(schema.metadata) == {b"huggingface", b"cantor"}
        assert json.loads(schema.metadata[b"cantor"])["task"] == footer.task


def test_plain_pyarrow(dataset: Path, clips: int) -> None:
    table = pq.read_table(dataset / "data")
    assert table.num_rows == clips
    row = table.slice(0, 1).to_pylist()[0]
    wav, rate = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
    assert (rate, len(wav)) == (row["sample_rate"], row["num_samples"])
    assert len(row["f0"]) == row["num_samples"] // 512
    units = np.frombuffer(row["units_mfcc"], "<f2").reshape(row["num_unit_frames_mfcc"], -1)
    assert units.shape[1] == 39


def test_audio_and_units_are_stored_as_they_are(dataset: Path) -> None:
    path = next(p for p in iter_shards(dataset) if pq.read_metadata(p).num_rows)
    group = pq.read_metadata(path).row_group(0)
    by_path = {
        group.column(i).path_in_schema: group.column(i).compression
        for i in range(group.num_columns)
    }
    assert by_path["audio.bytes"] == by_path["units_mfcc"] == "UNCOMPRESSED"
    assert by_path["f0.list.element"] == by_path["clip_id"] == "ZSTD"


def test_pandas(dataset: Path, clips: int) -> None:
    table = pd.read_parquet(dataset / "data")
    assert len(table) == clips
    assert table["clip_id"].is_unique
    assert table["f0"].iloc[0].dtype == np.float32
    assert table["gain_db"].dtype == np.float32


def test_duckdb(dataset: Path, clips: int) -> None:
    query = f"""
        select count(*), count(distinct clip_id), sum(num_samples), max(len(f0)),
               min(octet_length(audio.bytes))
        from read_parquet('{dataset}/data/*.parquet')
    """
    rows, distinct, samples, frames, smallest = duckdb.sql(query).fetchall()[0]
    assert rows == distinct == clips
    assert samples > 0 and frames > 0 and smallest > 0


def test_hugging_face_datasets(dataset: Path, clips: int, tmp_path: Path) -> None:
    from datasets import Audio, load_dataset

    loaded = load_dataset(
        "parquet", data_files=f"{dataset}/data/*.parquet", split="train", cache_dir=str(tmp_path)
    )
    assert len(loaded) == clips
    assert isinstance(loaded.features["audio"], Audio)
    assert loaded.features["audio"].sampling_rate == 44100
    assert loaded.features["f0"].feature.dtype == "float32"
    assert loaded.features["units_mfcc"].dtype == "binary"
    row = loaded.cast_column("audio", Audio(decode=False))[0]
    wav, _ = sf.read(io.BytesIO(row["audio"]["bytes"]))
    assert len(wav) == row["num_samples"]


def test_hugging_face_reads_the_folder_by_its_card(dataset: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = load_dataset(str(dataset), cache_dir=str(tmp_path))
    assert set(loaded) == {"train"}


@pytest.mark.ray
def test_ray_data(dataset: Path, clips: int) -> None:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        data = ray.data.read_parquet(str(dataset / "data"))
        assert data.count() == clips
        row = data.take(1)[0]
        assert len(row["f0"]) == row["num_samples"] // 512
        assert np.asarray(row["f0"]).dtype == np.float32
        assert isinstance(row["units_mfcc"], bytes)
    finally:
        ray.shutdown()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        commit_file(tmp_path, "data/x.parquet", write)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_what_is_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"torn\.parquet is not a whole Parquet file"):
        read_footer(tmp_path / "torn.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet has no 'cantor'"):
        read_footer(tmp_path / "other.parquet")
