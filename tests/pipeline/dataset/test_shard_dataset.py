"""Shards as training examples: what an example is, in which order they come, what is refused."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import pickle
import re
import runpy
import shutil
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from torch.utils.data import DataLoader

from models.synthesizer.batch import Batch
from pipeline.cluster.ray_connection import connected
from pipeline.dataset.data_config import DataConfig
from pipeline.dataset.examples import collate
from pipeline.dataset.schema import OLDEST_SUPPORTED, SCHEMA_VERSION, EncoderIdentity
from pipeline.dataset.shard_dataset import ShardDataset, Share
from pipeline.dataset.shards import iter_shards, read_footer, write_shard
from pipeline.errors import UserError
from stages.f0 import F0Config, estimate_f0
from tests.helpers.training_data import write_dataset

RATE, HOP = 8000, 80
ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
SMALL = DataConfig(batch_size=6, shuffle_groups=3, validation=0.2, max_frames=45)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine songs of three speakers, a shard each, 45 clips of 30 to 60 frames."""
    return write_dataset(
        tmp_path_factory.mktemp("made") / "dataset",
        speakers=("ann", "ben", "eve"),
        songs=3,
        clips=5,
        seconds=(0.3, 0.6),
        sample_rate=RATE,
        hop_length=HOP,
        dim=6,
    )


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture(scope="module")
def rows(shards: Path) -> dict[str, dict[str, Any]]:
    """Return the rows by clip id, read with plain pyarrow."""
    return {row["clip_id"]: row for row in pq.read_table(shards / "data").to_pylist()}


def shares(data: ShardDataset, steps: int, **at: int) -> list[Share]:
    return list(islice(data.batches(**at), steps))


def ids(found: list[Share]) -> list[tuple[str, ...]]:
    return [share.batch.clip_ids for share in found]


def assert_equal(left: Batch, right: Batch) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


# What an example is.


def test_an_example_is_the_clip_on_the_frame_clock(
    shards: Path, rows: dict[str, dict[str, Any]]
) -> None:
    data = ShardDataset(shards, data=DataConfig(), subset="all")
    assert len(data) == 45
    assert data.identity.speakers == ("ann", "ben", "eve")
    assert (data.identity.sample_rate, data.identity.hop_length) == (RATE, HOP)
    for example in data:
        row = rows[example.clip_id]
        wav = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0]
        frames = len(wav) // HOP
        f0 = np.array(row["f0"], np.float32)
        voiced = np.flatnonzero(f0)
        stored = np.frombuffer(row["units_mfcc"], "<f2").reshape(-1, 6).astype(np.float32)
        at = np.minimum(np.arange(frames) * len(stored) // frames, len(stored) - 1)
        assert np.array_equal(example.wav, wav[: frames * HOP])
        assert np.array_equal(example.voiced, f0 > 0) and 0 < example.voiced.mean() < 1
        # The peer's float32 times move an f0 that glides by up to 0.06 cents.
        assert np.allclose(example.f0, np.interp(np.arange(frames), voiced, f0[voiced]), rtol=1e-4)
        assert example.f0.min() > 100
        # Where the index lies on the edge of a unit, its float32 arithmetic may take the next one.
        assert (example.units.T == stored[at]).all(axis=1).mean() > 0.9
        assert example.units.shape == (6, frames) == (6, len(example))
        hop_in = wav[HOP // 2 : HOP // 2 + HOP]  # frame 1 counts from half a hop before it
        assert example.volume.shape == (frames,)
        assert example.volume[1] == pytest.approx(np.sqrt((hop_in**2).mean()), rel=1e-5)
        assert data.identity.speakers[example.speaker] == row["speaker"]
        kinds = {example.wav.dtype, example.f0.dtype, example.voiced.dtype, example.volume.dtype}
        assert kinds == {example.units.dtype} == {np.dtype(np.float32)}


def test_what_extract_made_can_be_trained_from(dataset: Path) -> None:
    """One of its shards has no clips."""
    data = ShardDataset(dataset, subset="all", data=DataConfig(batch_size=4, max_frames=120))
    clips = pq.read_table(dataset / "data", columns=["clip_id"])["clip_id"].to_pylist()
    batches = [share.batch for share in shares(data, data.steps_per_epoch)]
    assert {clip for batch in batches for clip in batch.clip_ids} == set(clips)
    assert data.identity.speakers == ("spk0", "spk1", "spk2")
    assert {batch.units.shape[:2] for batch in batches} == {(4, 39)}
    assert all((batch.f0 > 50).sum(dim=1).equal(batch.lengths) for batch in batches)


def test_a_clip_without_voice_has_f0_of_zero(copy: Path) -> None:
    change(copy, lambda table: put(table, "f0", [[0.0] * len(f) for f in table["f0"].to_pylist()]))
    example = ShardDataset(copy, subset="all")[0]
    assert not example.voiced.any() and not example.f0.any()


def test_a_long_clip_gives_another_stretch_in_each_epoch(shards: Path) -> None:
    whole = ShardDataset(shards, subset="all")
    cropped = ShardDataset(shards, data=dataclasses.replace(SMALL, max_frames=32), subset="all")
    starts: set[int] = set()
    for epoch in range(12):
        full, part = whole.example(3), cropped.example(3, epoch)
        assert len(full) > 40 and len(part) == 32
        (start,) = (
            i for i in range(len(full) - 31) if np.array_equal(full.f0[i : i + 32], part.f0)
        )
        starts.add(start)
        assert np.array_equal(full.units[:, start : start + 32], part.units)
        assert np.array_equal(full.volume[start : start + 32], part.volume)
        assert np.array_equal(full.voiced[start : start + 32], part.voiced)
        assert np.array_equal(full.wav[start * HOP : (start + 32) * HOP], part.wav)
        assert np.array_equal(cropped.example(3, epoch).wav, part.wav)
    assert len(starts) > 5


def test_volume_is_changed_by_one_gain_to_a_tenth_or_full_scale_at_most(shards: Path) -> None:
    config = dataclasses.replace(SMALL, volume_augment=True)
    plain = ShardDataset(shards, data=SMALL, subset="all")
    changed = ShardDataset(shards, data=config, subset="all")
    gains = []
    for i in range(len(plain)):
        before, after = plain[i], changed[i]
        gain = float(np.abs(after.wav).max() / np.abs(before.wav).max())
        assert np.allclose(after.wav, gain * before.wav, atol=1e-6)
        assert np.allclose(after.volume, gain * before.volume, atol=1e-6)
        assert np.array_equal(after.f0, before.f0) and np.array_equal(after.units, before.units)
        assert np.abs(after.wav).max() <= 1 and gain > 0.0999
        gains.append(gain)
    same = np.mean(np.isclose(gains, 1, atol=1e-6))
    assert 0.25 < same < 0.75  # so-vits-svc tosses a coin for each clip
    assert min(gains) < 0.3 and max(gains) > 1.5
    validation = ShardDataset(shards, data=config, subset="validation")
    assert all(np.array_equal(e.wav, plain[place(plain, e.clip_id)].wav) for e in validation)


def place(data: ShardDataset, clip_id: str) -> int:
    return data.index.clip_ids.to_pylist().index(clip_id)


def test_a_shifted_clip_sounds_at_the_f0_it_states(tmp_path: Path) -> None:
    """Against an estimator that knows nothing of the shift."""
    write_dataset(tmp_path, songs=1, clips=6, seconds=(1.0, 1.2), sample_rate=16000, hop_length=160)
    plain = ShardDataset(tmp_path, subset="all")
    data = ShardDataset(tmp_path, data=DataConfig(key_shift=5), subset="all")
    semitones = []
    for i in range(len(data)):
        before, after = plain[i], data[i]
        semitones.append(12 * np.log2(after.f0[5] / before.f0[5]))
        assert len(after.wav) == 160 * len(after) and after.units.shape[1] == len(after)
        assert len(after) == pytest.approx(len(before) / 2 ** (semitones[-1] / 12), abs=2)
        heard = estimate_f0(after.wav, 16000, F0Config(method="dio", hop_length=160), len(after))
        both = (heard > 0) & (after.voiced > 0)
        cents = 1200 * np.log2(heard[both] / after.f0[both])
        assert both.mean() > 0.5 and np.median(np.abs(cents)) < 20
    assert min(semitones) < -1 < 1 < max(semitones) and np.abs(semitones).max() < 5.1


def test_a_shift_never_makes_a_clip_too_short(shards: Path) -> None:
    data = ShardDataset(shards, data=DataConfig(key_shift=12), subset="all")
    lengths = [len(data.example(i, epoch)) for i in range(0, 45, 5) for epoch in range(4)]
    assert min(lengths) >= data.data.min_frames < 60 < max(lengths)


def test_short_clips_are_left_out_and_counted(shards: Path) -> None:
    frames = ShardDataset(shards, subset="all").index.num_samples // HOP
    data = ShardDataset(shards, data=DataConfig(min_frames=45), subset="all")
    assert data.left_out == {"too_short": int((frames < 45).sum())}
    assert len(data) == (frames >= 45).sum() > 0
    assert min(map(len, data)) >= 45
    assert ShardDataset(shards, data=DataConfig(min_frames=20)).left_out == {}


# In which order they come.


@pytest.fixture(scope="module")
def two_epochs(shards: Path) -> list[Share]:
    data = ShardDataset(shards, data=SMALL)
    return shares(data, 2 * data.steps_per_epoch)


def test_every_clip_comes_once_an_epoch_but_those_that_fill_it_up(
    shards: Path, two_epochs: list[Share]
) -> None:
    data = ShardDataset(shards, data=SMALL)
    assert (len(data), data.steps_per_epoch) == (35, 6)
    for epoch in range(2):
        found = [share for share in two_epochs if share.epoch == epoch]
        clips = [clip for batch in ids(found) for clip in batch]
        times = Counter(clips)
        assert len(found) == 6 and len(clips) == 36
        assert set(times) == set(data.index.clip_ids.to_pylist())
        assert [clip for clip, n in times.items() if n == 2] == clips[:1] == clips[-1:]
    assert ids(two_epochs[:6]) != ids(two_epochs[6:])
    assert ids(shares(ShardDataset(shards, data=SMALL, seed=1), 6)) != ids(two_epochs[:6])


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("key_shift", [0.0, 4.0])
def test_shares_of_workers_make_the_batch_of_one(
    shards: Path, workers: int, key_shift: float
) -> None:
    data = ShardDataset(shards, data=dataclasses.replace(SMALL, key_shift=key_shift))
    alone = shares(data, 8)
    of_worker = [shares(data, 8, rank=rank, world_size=workers) for rank in range(workers)]
    for step, whole in enumerate(alone):
        parts = [of_worker[rank][step] for rank in range(workers)]
        assert {part.totals for part in parts} == {whole.totals}
        assert whole.totals.examples == 6
        assert whole.totals.frames == int(whole.batch.lengths.sum())
        for rank, part in enumerate(parts):
            assert_equal(part.batch, every(whole.batch, rank, workers))


def every(batch: Batch, rank: int, workers: int) -> Batch:
    """Clips rank, rank + workers, ... of a batch, padded as it is."""
    return Batch(**{name: value[rank::workers] for name, value in vars(batch).items()})


def test_a_batch_ends_in_zeros_after_each_clip(two_epochs: list[Share]) -> None:
    for batch, _, _ in two_epochs:
        longest = int(batch.lengths.max())
        assert batch.units.shape == (6, 6, longest) and batch.wav.shape == (6, longest * HOP)
        assert batch.speaker.dtype == batch.lengths.dtype == torch.int64
        for i, length in enumerate(batch.lengths.tolist()):
            assert not batch.units[i, :, length:].any() and not batch.wav[i, length * HOP :].any()
            for row in (batch.f0[i], batch.voiced[i], batch.volume[i]):
                assert not row[length:].any() and row[:length].any()


@pytest.mark.parametrize("start", [1, 4, 6, 9])
def test_a_run_goes_on_where_it_was_interrupted(
    shards: Path, two_epochs: list[Share], start: int
) -> None:
    rest = shares(ShardDataset(shards, data=SMALL), 12 - start, start_step=start)
    for share, expected in zip(rest, two_epochs[start:], strict=True):
        assert_equal(share.batch, expected.batch)
        assert (share.totals, share.epoch) == (expected.totals, expected.epoch)


def test_a_later_step_does_not_read_what_was_before_it(copy: Path) -> None:
    """One row group is mixed at a time, and the first one of the epoch is destroyed."""
    config = dataclasses.replace(SMALL, shuffle_groups=1, batch_size=5, prefetch=1)
    data = ShardDataset(copy, data=config, subset="all")
    first = int(data.index.group[data.order.epoch(0)[0, 0]])
    shard = Path(data.index.row_groups.where(first))
    damage_audio(shard)
    with pytest.raises(UserError, match=rf"{shard.name} .*verify"):
        shares(data, 1)
    assert len(shares(data, 6, start_step=1)) == 6


def damage_audio(shard: Path) -> None:
    """Turn over bits of the audio in place; the footer stays as it is."""
    with pq.ParquetFile(shard) as file:
        column = file.metadata.row_group(0).column(file.schema.names.index("bytes"))
    place = column.data_page_offset + column.total_compressed_size // 2
    content = bytearray(shard.read_bytes())
    content[place : place + 64] = bytes(255 - byte for byte in content[place : place + 64])
    shard.write_bytes(content)


def test_noise_keys_are_each_clips_own_in_each_epoch(two_epochs: list[Share]) -> None:
    """One of them written out: an interrupted run must draw the same noise, too."""
    keys = {
        (share.epoch, clip): key
        for share in two_epochs
        for clip, key in zip(share.batch.clip_ids, share.batch.noise_keys, strict=True)
    }
    assert len(keys) == len(set(keys.values())) == 70
    assert all(0 <= key < 2**63 for key in keys.values())
    assert keys[0, "ann/song0.wav#000000"] == 4279378043893378088


def test_songs_are_never_split(shards: Path) -> None:
    parts = {
        subset: ShardDataset(shards, data=SMALL, subset=subset)
        for subset in ("train", "validation", "all")
    }
    songs = {name: {e.clip_id.partition("#")[0] for e in part} for name, part in parts.items()}
    assert len(songs["validation"]) == 2  # a fifth of nine
    assert not songs["train"] & songs["validation"]
    assert songs["train"] | songs["validation"] == songs["all"]
    assert len(parts["train"]) + len(parts["validation"]) == len(parts["all"]) == 45
    # A speaker has the same number in each part.
    speakers = {e.clip_id[:3]: e.speaker for e in parts["all"]}
    assert speakers == {"ann": 0, "ben": 1, "eve": 2}
    assert all(e.speaker == speakers[e.clip_id[:3]] for e in parts["validation"])


def test_the_only_song_of_each_speaker_is_trained_with(tmp_path: Path) -> None:
    write_dataset(tmp_path, songs=1, clips=2, sample_rate=RATE, hop_length=HOP)
    held = ShardDataset(tmp_path, subset="validation")
    assert len(held) == 0 and list(held) == []
    with pytest.raises(UserError, match="no clips for 'validation'"):
        held.batches()
    assert len(ShardDataset(tmp_path)) == 4


# From where and how they are read.


def test_other_file_systems_give_the_same(
    shards: Path, two_epochs: list[Share], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = pafs.SubTreeFileSystem(str(shards.parent), pafs.LocalFileSystem())
    monkeypatch.chdir(shards.parent)
    for path, filesystem in (
        ("dataset", inside),
        (shards.as_uri(), None),
        ("dataset/", None),
        (shards.name, pafs.LocalFileSystem()),
    ):
        data = ShardDataset(path, data=SMALL, filesystem=filesystem)
        assert_equal(shares(data, 1)[0].batch, two_epochs[0].batch)
    with pytest.raises(UserError, match=r"nowhere://x cannot be opened: .*nowhere"):
        ShardDataset("nowhere://x")


def test_it_is_a_map_style_dataset_of_pytorch(shards: Path) -> None:
    data = ShardDataset(shards, data=SMALL)
    data[0]
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[7].wav, data[7].wav)
    with pytest.raises(IndexError):
        data[len(data)]
    loader = DataLoader(again, batch_size=4, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert [clip for batch in batches for clip in batch.clip_ids] == [e.clip_id for e in data]
    assert_equal(batches[1], collate([data[i] for i in range(4, 8)]))


def test_closing_leaves_no_thread_and_nothing_starts_before_the_first_step(shards: Path) -> None:
    before = threading.active_count()
    batches = ShardDataset(shards, data=SMALL).batches()
    assert threading.active_count() == before
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    for _ in ShardDataset(shards, data=SMALL).batches():
        break
    gc.collect()
    assert threading.active_count() == before


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 9)])
def test_threads_and_prefetch_change_nothing(
    shards: Path, two_epochs: list[Share], threads: int, prefetch: int
) -> None:
    config = dataclasses.replace(SMALL, loader_threads=threads, prefetch=prefetch)
    found = shares(ShardDataset(shards, data=config), 12)
    for share, expected in zip(found, two_epochs, strict=True):
        assert_equal(share.batch, expected.batch)


def test_what_a_thread_meets_is_raised_here(copy: Path) -> None:
    before = threading.active_count()
    damage_audio(iter_shards(copy)[4])
    with pytest.raises(UserError, match=rf"{iter_shards(copy)[4].name} "):
        shares(ShardDataset(copy, data=SMALL, subset="all"), 8)
    assert threading.active_count() == before


def test_memory_is_that_of_the_groups_that_are_mixed(tmp_path: Path) -> None:
    """Sixteen shards of 2 MB of units each, four of them mixed."""
    write_dataset(
        tmp_path,
        songs=8,
        clips=8,
        seconds=(0.4, 0.41),
        sample_rate=4000,
        hop_length=40,
        dim=6000,
    )
    config = DataConfig(batch_size=4, shuffle_groups=4, prefetch=1, loader_threads=1)
    data = ShardDataset(tmp_path, data=config, subset="all")
    stored = len(data) * 20 * 6000 * 2
    batch = 4 * 40 * 6000 * 4
    pool = pa.default_memory_pool()
    tracemalloc.start()  # what is held lies in Python's bytes and numpy's arrays
    try:
        seen = sum(len(share.batch) for share in islice(data.batches(), 32))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == 128
    # Four of the sixteen groups, a group on its way, and batches: one to train with, one ready,
    # one in the making, with its examples.
    assert peak < 5 / 16 * stored + 4 * batch + 2**20, (peak, stored, batch)
    assert pool.bytes_allocated() < stored / 8


# What is refused.


def change(dataset: Path, edit: Any = None, shard: int = 0, **footer: Any) -> str:
    """Write a shard anew with another table or footer; its name."""
    path = iter_shards(dataset)[shard]
    table = pq.read_table(path)
    new = dataclasses.replace(read_footer(path), **footer)
    return write_shard(dataset, path.name, edit(table) if edit else table, new).name


def put(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.field(at), pa.array(values, table.field(at).type))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sample_rate", 16000, "its sample_rate is 16000, not 8000"),
        ("hop_length", 100, "its hop_length is 100, not 80"),
        ("f0_method", "rmvpe", "its f0_method is rmvpe, not dio"),
        ("fingerprint", "e" * 64, "its fingerprint is eee"),
        (
            "encoders",
            [EncoderIdentity("mfcc", 6, "float16", 50.0, "ab" * 32)],
            r"its encoders is mfcc \(6 float16, abab.*not mfcc \(6 float16, None\)",
        ),
    ],
)
def test_shards_that_disagree_are_refused(copy: Path, key: str, value: Any, words: str) -> None:
    name = change(copy, shard=3, **{key: value})
    with pytest.raises(UserError, match=rf"{name} does not belong to train-00000.*{words}"):
        ShardDataset(copy)


def test_what_the_dataset_lacks_is_said(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is not a dataset: it has no dataset\.json; `ext"):
        ShardDataset(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no units of 'hubertsoft'; data\.encoder can be mfcc$"):
        ShardDataset(copy, "hubertsoft")
    with pytest.raises(UserError, match=r"no split 'test'; data.split can be train$"):
        ShardDataset(copy, data=DataConfig(split="test"))
    with pytest.raises(UserError, match=r"45 are shorter than data\.min_frames, 790"):
        ShardDataset(copy, data=DataConfig(min_frames=790))
    shutil.rmtree(copy / "data")
    with pytest.raises(UserError, match="has no shards yet; run `extract` first"):
        ShardDataset(copy)
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset\.json is not the dataset\.json of a"):
        ShardDataset(copy)


def test_other_files_and_formats_are_refused(copy: Path) -> None:
    info = json.loads((copy / "dataset.json").read_text())
    for version, words in (
        (OLDEST_SUPPORTED - 1, "run `cantor extract --from .* NEW`"),
        (SCHEMA_VERSION + 1, "install a newer Cantor"),
        (None, "install a newer Cantor"),
    ):
        (copy / "dataset.json").write_text(json.dumps({**info, "schema_version": version}))
        with pytest.raises(UserError, match=rf"shards of schema version {version}, .*{words}"):
            ShardDataset(copy)
    (copy / "dataset.json").write_text(json.dumps({**info, "settings": {"f0.interpolate": True}}))
    with pytest.raises(UserError, match=r"f0 without gaps .* f0\.interpolate=false"):
        ShardDataset(copy)
    (copy / "dataset.json").write_text(json.dumps(info))
    foreign = copy / "data" / "train-00100.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    with pytest.raises(UserError, match=r"train-00100\.parquet has no 'cantor' metadata"):
        ShardDataset(copy)
    foreign.write_bytes(iter_shards(copy)[0].read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train-00100\.parquet cannot be read: "):
        ShardDataset(copy)


def test_ids_of_a_codebook_are_refused(copy: Path) -> None:
    ids = EncoderIdentity("mfcc", 1, "int16", 50.0, None, "ab" * 32, 100)
    for number in range(9):
        change(copy, shard=number, encoders=[ids])
    with pytest.raises(UserError, match=r"'mfcc' in .* are ids of a codebook \(int16\); `extract"):
        ShardDataset(copy)


def test_of_several_encoders_one_is_chosen(copy: Path) -> None:
    more = EncoderIdentity("log-mel", 2, "float16", 50.0, None)

    def with_more(table: pa.Table) -> pa.Table:
        cells = [b"\0" * 4 * frames for frames in table["num_unit_frames_mfcc"].to_pylist()]
        table = table.append_column(more.column, pa.array(cells, pa.binary()))
        return table.append_column(more.frames_column, table["num_unit_frames_mfcc"])

    for number in range(9):
        mfcc = read_footer(iter_shards(copy)[number]).encoders
        change(copy, with_more, shard=number, encoders=[*mfcc, more])
    with pytest.raises(UserError, match=r"units of mfcc, log-mel; choose one with data\.encoder"):
        ShardDataset(copy)
    assert ShardDataset(copy, "log-mel")[0].units.shape[0] == 2
    assert ShardDataset(copy, data=DataConfig(encoder="mfcc"))[0].units.shape[0] == 6


@pytest.mark.parametrize(
    ("column", "cells", "words"),
    [
        ("f0", [[1.0, 2.0]] * 5, r"its f0 has 2 frames, but its audio has \d+"),
        (
            "units_mfcc",
            [b"abcd"] * 5,
            r"its units have 4 bytes, which is not \d+ frames of width",
        ),
        ("num_unit_frames_mfcc", [0] * 5, "which is not 0 frames"),
        ("audio", [{"bytes": b"abcd", "path": None}] * 5, "its audio does not decode"),
    ],
)
def test_a_clip_that_does_not_fit_together_is_named(
    copy: Path, column: str, cells: list[Any], words: str
) -> None:
    name = change(copy, lambda table: put(table, column, cells))
    data = ShardDataset(copy, subset="all")
    with pytest.raises(UserError, match=rf"{name} is damaged: ann/song0.wav#000000: .*{words}"):
        data[0]


def test_a_shard_that_is_written_anew_meanwhile_is_noticed(copy: Path) -> None:
    data = ShardDataset(copy, subset="all")
    name = change(copy, lambda table: table.take([4, 3, 2, 1, 0]))
    with pytest.raises(UserError, match=rf"{name} was changed while it was read; start again"):
        data[0]


def test_workers_must_share_a_batch_evenly(shards: Path) -> None:
    data = ShardDataset(shards, data=SMALL)
    with pytest.raises(UserError, match=r"data\.batch_size is 6, which 4 .* a multiple of 4"):
        data.batches(rank=0, world_size=4)


# The examples of how to use it.


@pytest.fixture(scope="module")
def to_learn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("learn"), sample_rate=RATE, hop_length=HOP)


def test_the_code_in_the_documentation_runs(to_learn: Path) -> None:
    text = (ROOT / "docs" / "training-data.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == 3
    for code in found:
        assert "DATASET" in code
        exec(compile(code.replace("DATASET", str(to_learn)), "training-data.md", "exec"), {})


def test_the_plain_trainer_learns(to_learn: Path) -> None:
    losses = runpy.run_path(str(EXAMPLES / "train_toy.py"))["train"](to_learn, 40)
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.ray
def test_two_workers_of_ray_learn_what_one_learns(
    to_learn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = EXAMPLES / "train_toy_ray.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(to_learn), str(tmp_path)])
    with connected(None):
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    losses = json.loads(printed[printed.index("[") :])
    assert np.allclose(losses, list(alone(script, to_learn, len(losses))), rtol=1e-4)
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    assert list(tmp_path.rglob("model.pt"))


def alone(script: Path, dataset: Path, steps: int) -> Iterator[float]:
    """The losses of the same model trained on whole batches, without Ray."""
    loss_of = runpy.run_path(str(script))["loss_of"]
    data = ShardDataset(dataset, data=DataConfig(batch_size=8))
    torch.manual_seed(0)
    model = torch.nn.Conv1d(data.identity.encoder.dim + 2, 1, 5, padding=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch, totals, _ in islice(data.batches(), steps):
        loss = loss_of(model, batch, totals.frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
