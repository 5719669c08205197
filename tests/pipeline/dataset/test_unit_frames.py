"""The frames of a dataset, group by group."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.schema import SCHEMA_VERSION, EncoderIdentity
from pipeline.dataset.shards import Footer, iter_shards, read_footer
from pipeline.dataset.unit_frames import UnitFrames, find_units
from pipeline.errors import UserError


@pytest.fixture
def units(dataset: Path) -> UnitFrames:
    return find_units(dataset)


def whole(dataset: Path, speaker: str | None = None) -> np.ndarray:
    rows = pq.read_table(dataset / "data", columns=["speaker", "units_mfcc"]).to_pylist()
    cells = [r["units_mfcc"] for r in rows if speaker in (None, r["speaker"])]
    return np.concatenate([np.frombuffer(c, "<f2").reshape(-1, 39) for c in cells]).astype("f4")


def rows_of(frames: np.ndarray) -> list[bytes]:
    return sorted(frame.tobytes() for frame in frames)


def test_blocks_are_all_frames(units: UnitFrames, dataset: Path) -> None:
    blocks = list(units.blocks())
    assert np.array_equal(np.concatenate(blocks), whole(dataset))
    assert units.total == sum(map(len, blocks))
    assert units.encoder.name == "mfcc" and blocks[0].dtype == np.float32


def test_a_speaker_has_frames_of_their_own(units: UnitFrames, dataset: Path) -> None:
    parts = [units.of(speaker) for speaker in units.speakers]
    assert len(parts) == 3 and sum(part.total for part in parts) == units.total
    for part in parts:
        assert np.array_equal(np.concatenate(list(part.blocks())), whole(dataset, part.speaker))
    with pytest.raises(UserError, match="no clips of speaker 'nobody' \\(it has "):
        units.of("nobody")


def test_batches_are_all_frames_once_mixed_by_the_seed(units: UnitFrames, dataset: Path) -> None:
    def batches(seed: int) -> list[np.ndarray]:
        return list(units.batches(100, seed, epoch=0))

    once = batches(0)
    assert {len(batch) for batch in once[:-1]} == {100}
    assert not np.array_equal(once[0], next(iter(units.batches(100, 0, epoch=1))))
    assert rows_of(np.concatenate(once)) == rows_of(whole(dataset))
    assert all(np.array_equal(a, b) for a, b in zip(once, batches(0), strict=True))
    assert not np.array_equal(once[0], batches(1)[0])


def test_a_sample_has_the_size_asked_for_and_no_frame_twice(
    units: UnitFrames, dataset: Path
) -> None:
    known = set(rows_of(whole(dataset)))
    sample = units.sample(500, seed=3)
    assert sample.shape == (500, 39)
    assert set(rows_of(sample)) <= known
    assert np.array_equal(sample, units.sample(500, seed=3))
    assert not np.array_equal(sample, units.sample(500, seed=4))
    assert np.array_equal(np.concatenate(list(units.sampled_blocks(500, 3))), sample)
    assert len(units.sample(10**9, seed=0)) == units.total
    assert len(units.of(units.speakers[0]).sample(50, seed=0)) == 50


def test_every_frame_is_as_likely_to_be_drawn(units: UnitFrames) -> None:
    counts = units.counts
    drawn = np.zeros(len(counts))
    for seed in range(200):
        bar = units._key_of_rank(units.total // 5, seed)
        drawn += [np.sum(units._keys(i, seed) <= bar) for i in range(len(counts))]
    share = drawn / (200 * np.array(counts))
    # Binomial, 200 draws of at least 50 frames each: three deviations are 0.012.
    assert min(counts) > 50 and np.abs(share - 0.2).max() < 0.012


def test_what_the_dataset_lacks_is_said(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a dataset"):
        find_units(tmp_path)
    with pytest.raises(UserError, match=r"no units of 'hubertsoft'; data.encoder can be mfcc"):
        find_units(dataset, "hubertsoft")
    with pytest.raises(UserError, match=r"no split 'test'; data.split can be train"):
        find_units(dataset, split="test")
    shutil.copy(dataset / "dataset.json", tmp_path)
    with pytest.raises(UserError, match="has no shards yet"):
        find_units(tmp_path)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def rewrite(shard: Path, footer: Footer, table: pa.Table | None = None) -> None:
    table = pq.read_table(shard) if table is None else table
    metadata = {**table.schema.metadata, b"cantor": footer.to_json().encode()}
    pq.write_table(table.replace_schema_metadata(metadata), shard, row_group_size=32)


def test_shards_that_disagree_and_ids_are_refused(copy: Path) -> None:
    shards = iter_shards(copy)
    footer = read_footer(shards[-1])
    (mfcc,) = footer.encoders
    other = dataclasses.replace(mfcc, checkpoint_sha256="ab" * 32)
    rewrite(shards[-1], dataclasses.replace(footer, encoders=[other]))
    with pytest.raises(UserError, match=rf"{shards[-1].name} does not belong .*encoders is mfcc"):
        find_units(copy)
    ids = dataclasses.replace(mfcc, dtype="int16")
    for shard in shards:
        rewrite(shard, dataclasses.replace(read_footer(shard), encoders=[ids]))
    with pytest.raises(UserError, match=r"are ids of a codebook \(int16\)"):
        find_units(copy)


def test_several_encoders_need_a_name(copy: Path) -> None:
    for shard in iter_shards(copy):
        footer = read_footer(shard)
        more = EncoderIdentity("log-mel", 80, "float16", 50.0, None)
        rewrite(shard, dataclasses.replace(footer, encoders=[*footer.encoders, more]))
    with pytest.raises(UserError, match=r"mfcc, log-mel; choose one with data\.encoder"):
        find_units(copy)
    assert find_units(copy, "mfcc").total > 0


def test_frames_that_are_not_as_many_as_stated_are_damage(copy: Path) -> None:
    shard = next(p for p in iter_shards(copy) if pq.read_metadata(p).num_rows)
    table = pq.read_table(shard)
    place = table.schema.get_field_index("num_unit_frames_mfcc")
    wrong = pa.array([n + 1 for n in table[place].to_pylist()], pa.int32())
    rewrite(shard, read_footer(shard), table.set_column(place, table.field(place), wrong))
    with pytest.raises(UserError, match=rf"{shard.name} is damaged: .*#000000: its units have"):
        list(find_units(copy).blocks())


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    """Forty row groups of 1.3 MB; what is held at a time is a few of them."""
    frames, dim = 500, 39
    rng = np.random.default_rng(0)
    meta = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": "f",
        "task": 0,
        "task_id": "t",
        "sample_rate": 44100,
        "hop_length": 512,
        "subtype": "PCM_16",
        "f0_method": "dio",
        "encoders": [EncoderIdentity("mfcc", dim, "float16", 50.0, None)],
        "environment": {},
        "ledger": [],
    }
    (tmp_path / "data").mkdir()
    info = {"schema_version": SCHEMA_VERSION, "fingerprint": "f", "settings": {}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    cells = [rng.standard_normal((frames, dim)).astype("<f2").tobytes() for _ in range(32)]
    table = pa.table(
        {
            "clip_id": [f"song#{i:06}" for i in range(32 * 40)],
            "speaker": ["ann"] * 32 * 40,
            "units_mfcc": pa.array(cells * 40, pa.binary()),
            "num_unit_frames_mfcc": pa.array([frames] * 32 * 40, pa.int32()),
        }
    )
    shard = tmp_path / "data" / "train-00000.parquet"
    schema = table.schema.with_metadata({"cantor": Footer(**meta).to_json()})
    pq.write_table(table.cast(schema), shard, row_group_size=32)
    del table
    units = find_units(tmp_path)
    assert units.total == 640_000
    tracemalloc.start()  # numpy's arrays and Python's bytes, which hold the frames
    total = sum(len(b) for b in units.batches(4096, seed=0, epoch=0))
    sampled = len(units.sample(2000, 0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (total, sampled) == (640_000, 2000)
    whole = 640_000 * dim * 4
    assert peak < whole / 4, peak
