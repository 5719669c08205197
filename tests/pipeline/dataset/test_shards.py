"""The format as other programs see it: each reader users have, types intact."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from pipeline.cluster.ray_connection import connected
from pipeline.dataset.account import Account
from pipeline.dataset.schema import shard_schema
from pipeline.dataset.shards import Footer, iter_shards, read_dataset_info, read_footer
from pipeline.dataset.verify import check_export, export_ledger, verify
from pipeline.errors import UserError
from pipeline.storage.atomic import commit_file


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

    with connected(None):
        ray.data.DataContext.get_current().enable_progress_bars = False
        data = ray.data.read_parquet(str(dataset / "data"))
        assert data.count() == clips
        row = data.take(1)[0]
        assert len(row["f0"]) == row["num_samples"] // 512
        # Rows come as arrays or as lists of Python floats; the numbers are float32 either way.
        assert np.array_equal(np.asarray(row["f0"], np.float32), np.asarray(row["f0"]))
        schema = data.schema()
        types = dict(zip(schema.names, schema.types, strict=True))
        assert types["f0"] == pa.list_(pa.float32())
        assert isinstance(row["units_mfcc"], bytes)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        commit_file(tmp_path, "data/x.parquet", write)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_what_is_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"torn\.parquet is not a complete Parquet file"):
        read_footer(tmp_path / "torn.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet has no 'cantor'"):
        read_footer(tmp_path / "other.parquet")


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, to be written to."""
    return Path(shutil.copytree(dataset, tmp_path / "damaged"))


@pytest.fixture
def smallest(damaged: Path) -> Path:
    """Its smallest shard that has clips."""
    shards = [path for path in iter_shards(damaged) if pq.read_metadata(path).num_rows]
    return min(shards, key=lambda path: path.stat().st_size)


def test_a_flipped_bit_in_the_footer_is_a_user_error_or_found_by_verify(
    damaged: Path, smallest: Path
) -> None:
    for path in iter_shards(damaged):  # one shard is enough, and its problems are all that count
        if path != smallest:
            path.unlink()
    whole = smallest.read_bytes()
    table = pq.read_table(smallest)
    before = verify(damaged).problems  # that the other tasks are not done
    length = int.from_bytes(whole[-8:-4], "little") + 8
    flips = range(8 * (len(whole) - length), 8 * len(whole), 131)
    refused, undetected = 0, []
    for bit in flips:
        torn = bytearray(whole)
        torn[bit // 8] ^= 1 << bit % 8
        smallest.write_bytes(torn)
        try:
            read_footer(smallest)
        except UserError as error:
            refused += 1
            assert smallest.name in str(error)
        if verify(damaged).problems == before:
            undetected.append(bit)
            # What no reader needs to get the cells: sizes and counts of encodings, the writer's
            # name, sort orders, padding in Arrow's copy of the schema.
            assert pq.read_table(smallest).equals(table)
    assert len(flips) > 500
    assert refused > len(flips) * 0.3
    assert len(undetected) < len(flips) * 0.12  # 59 of 591 when this was written


def test_a_changed_huggingface_entry_is_a_problem(damaged: Path, smallest: Path) -> None:
    whole = smallest.read_bytes()
    where = whole.rindex(b'"sampling_rate": 44100')
    smallest.write_bytes(whole[: where + 17] + b"48000" + whole[where + 22 :])
    assert [p for p in verify(damaged).problems if "huggingface" in p] == [
        f"{smallest.name}: its 'huggingface' metadata is not that of the format"
    ]


def test_statistics_that_are_not_those_of_the_rows_are_a_problem(
    damaged: Path, smallest: Path
) -> None:
    whole = smallest.read_bytes()
    column = pq.read_metadata(smallest).row_group(0).column(0)
    smallest_id = column.statistics.min.encode()
    where = whole.rindex(smallest_id)  # in the footer: readers skip row groups by it
    changed = whole[:where] + b"zzz" + whole[where + 3 :]
    smallest.write_bytes(changed)
    assert any("statistics" in problem for problem in verify(damaged).problems)


def test_the_checksum_is_the_one_that_is_documented(dataset: Path) -> None:
    for path in iter_shards(dataset):
        rest = json.loads(pq.read_schema(path).metadata[b"cantor"])
        sha256 = rest.pop("sha256")
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == sha256


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"sha256": 1}', '{"task": 1', "3"])
def test_what_is_no_cantor_entry_is_a_user_error(tmp_path: Path, text: str) -> None:
    schema = pa.schema([("a", pa.int32())], metadata={"cantor": text})
    pq.write_table(pa.table({"a": [1]}, schema=schema), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet is damaged"):
        read_footer(tmp_path / "x.parquet")


def test_a_footer_comes_back_as_it_was(dataset: Path) -> None:
    footer = read_footer(iter_shards(dataset)[0])
    assert Footer.from_json(footer.to_json()) == footer


def test_a_failing_disk_is_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_footer(tmp_path / "gone.parquet")


@pytest.mark.parametrize("key", ["settings", "fingerprint"])
def test_dataset_info_without_a_key_is_refused(damaged: Path, key: str) -> None:
    info = read_dataset_info(damaged)
    del info[key]
    (damaged / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"is not the dataset\.json of this program"):
        verify(damaged)


@pytest.mark.timeout(60)
def test_verify_does_not_hang_on_a_source_that_became_a_pipe(
    damaged: Path, writable_corpus: Path
) -> None:
    song = next(entry for entry in verify(damaged).account.entries)
    (writable_corpus / song).unlink()
    os.mkfifo(writable_corpus / song)
    assert verify(damaged, writable_corpus).problems == [f"{song}: not a regular file"]


def test_the_ledger_is_exported_into_a_new_folder(dataset: Path, tmp_path: Path) -> None:
    account = verify(dataset).account
    export_ledger(account, tmp_path / "new" / "folder" / "ledger.csv")
    assert len(pd.read_csv(tmp_path / "new" / "folder" / "ledger.csv")) == account.planned


def test_an_export_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("ledger.csv", "ledger.parquet"):
        check_export(tmp_path / name)
    with pytest.raises(UserError, match=r"\.csv or \.parquet"):
        check_export(tmp_path / "ledger.xlsx")
    with pytest.raises(UserError, match=r"\.csv or \.parquet"):
        export_ledger(Account(), tmp_path / "new" / "ledger.xlsx")
    assert not (tmp_path / "new").exists()
