"""Batches of audio for training encoders."""

from __future__ import annotations

import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.dataset.audio_batches import AudioBatches, AudioDataConfig
from pipeline.dataset.shards import iter_shards
from pipeline.errors import UserError
from stages.flac import decode_flac
from stages.pcm import dequantise
from stages.resample import ResampleConfig, resample

CROPPED = AudioDataConfig(batch_size=3, crop_s=1.0)


def batches(
    dataset: Path, data: AudioDataConfig = CROPPED, seed: int = 0, shortest: int = 400
) -> AudioBatches:
    return AudioBatches(
        dataset,
        data,
        sample_rate=16000,
        shortest=shortest,
        seed=seed,
        resampling=ResampleConfig(),
    )


def take(data: AudioBatches, count: int, start: int = 0) -> list[tuple[torch.Tensor, list[int]]]:
    with closing(data.stream(start)) as stream:
        return list(islice(stream, count))


def test_batches_are_padded_and_of_the_seed_and_step_alone(dataset: Path) -> None:
    data = batches(dataset)
    first = take(data, 9)
    for wavs, lengths in first:
        assert wavs.shape == (3, max(lengths)) and max(lengths) <= 16000
        for wav, length in zip(wavs, lengths, strict=True):
            assert wav[:length].any() and not wav[length:].any()
    for (wavs, _), (again, _) in zip(first[5:], take(data, 4, start=5), strict=True):
        assert torch.equal(wavs, again)
    other = take(batches(dataset, seed=1), 1)[0][0]
    assert first[0][0].shape != other.shape or not torch.equal(first[0][0], other)


def test_an_epoch_has_every_whole_clip_once(dataset: Path) -> None:
    data = batches(dataset, AudioDataConfig(batch_size=1, crop_s=60.0))
    table = pq.read_table(dataset / "data", columns=["audio", "sample_rate"])
    expected = [
        resample(
            dequantise(decode_flac(row["audio"]["bytes"], "PCM_16"), "PCM_16"),
            row["sample_rate"],
            16000,
            ResampleConfig(),
        ).tobytes()
        for row in table.to_pylist()
    ]
    assert len(data) == len(expected)
    epochs = [[wavs.numpy().tobytes() for wavs, _ in take(data, len(data), start)]
              for start in (0, len(data))]  # fmt: skip
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1]


def test_too_short_clips_are_left_out(dataset: Path) -> None:
    num_samples = pq.read_table(dataset / "data", columns=["num_samples", "sample_rate"])
    rate = num_samples["sample_rate"][0].as_py()
    lengths = num_samples["num_samples"].to_numpy() * 16000 / rate
    shortest = int(np.median(lengths))
    assert len(batches(dataset, shortest=shortest)) == (lengths >= shortest).sum()
    with pytest.raises(UserError, match="no clip in split 'train' that is long enough"):
        batches(dataset, shortest=10**9)


def test_a_damaged_shard_is_named(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    data = batches(copy)
    shards = [path for path in iter_shards(copy) if pq.read_metadata(path).num_rows]
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 255  # audio is most of the file
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"data/train-\d+\.parquet cannot be read: "):
        take(data, 1)
