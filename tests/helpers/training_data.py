"""Small training datasets, written directly as shards without extraction or networks.

Pitch, loudness and units are those of the audio: a network that learns from them can become better.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.schema import (
    QUALITY_COLUMNS,
    SCHEMA_VERSION,
    EncoderIdentity,
    shard_schema,
)
from pipeline.dataset.shards import Footer, write_shard
from stages.flac import encode_flac
from stages.pcm import quantise
from stages.units import pack_units

UNIT_RATE = 50
_PHONES = 6  # which sound is sung: it shapes the spectrum and is what the units tell
_PHONE_S = 0.15


def write_dataset(
    folder: Path,
    *,
    speakers: Sequence[str] = ("ann", "ben"),
    songs: int = 2,
    clips: int = 4,
    seconds: tuple[float, float] = (0.5, 1.2),
    sample_rate: int = 16000,
    hop_length: int = 160,
    dim: int = 8,
    encoder: str = "mfcc",
    shards: int | None = None,
    split: str = "train",
    seed: int = 0,
    first_task: int = 0,
) -> Path:
    """Write a valid dataset at `folder`, and return that.

    speakers: of each, `songs` songs `<speaker>/song<i>.wav` of `clips` clips each, whose lengths
    are drawn evenly from `seconds`. A clip is a harmonic tone with a gliding f0 and vibrato, breath
    in place of it at both ends, and a spectrum that changes with the sound that is sung.
    sample_rate, hop_length: of audio and f0, any of 4000 Hz and more.
    dim: width of the units of `encoder`, 50 a second: a vector of the sound, with a little noise.
    shards: the songs are dealt out to so many, one after the other; None: a shard a song. A row
    group has 32 clips, or what there is.
    split, first_task: the shards are `<split>-<first_task>.parquet` and on, so that several calls
    can fill one folder.

    The same arguments write the same bytes. A clip depends on its name and `seed` alone.
    """
    identity = EncoderIdentity(encoder, dim, "float16", float(UNIT_RATE), None)
    names = [(who, f"{who}/song{i}.wav") for who in speakers for i in range(songs)]
    count = shards or len(names)
    for number in range(count):
        footer = _footer(identity, first_task + number, sample_rate, hop_length)
        rows = [
            _row(who, song, i, clips, _clip(f"{song}#{i}", who, seconds, sample_rate, seed), footer)
            for who, song in names[number::count]
            for i in range(clips)
        ]
        table = pa.Table.from_pylist(rows, shard_schema([identity], sample_rate))
        write_shard(folder, f"{split}-{footer.task:05d}.parquet", table, footer)
    _write_info(folder, identity, sample_rate, hop_length, sorted(speakers))
    return folder


def _footer(identity: EncoderIdentity, task: int, sample_rate: int, hop_length: int) -> Footer:
    return Footer(
        schema_version=SCHEMA_VERSION,
        fingerprint="f" * 64,
        task=task,
        task_id=f"{task:064x}",
        sample_rate=sample_rate,
        hop_length=hop_length,
        subtype="PCM_16",
        f0_method="dio",
        encoders=[identity],
        environment={},
        ledger=[],
    )


def _write_info(
    folder: Path, identity: EncoderIdentity, sample_rate: int, hop_length: int, speakers: list[str]
) -> None:
    info = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": "f" * 64,
        "settings": {"f0.interpolate": False},
        "speakers": speakers,
        "sample_rate": sample_rate,
        "hop_length": hop_length,
        "encoders": [identity.name],
        "f0_method": "dio",
    }
    (folder / "dataset.json").write_text(json.dumps(info))


def _clip(
    name: str, speaker: str, seconds: tuple[float, float], sample_rate: int, seed: int
) -> dict[str, Any]:
    """wav (T,), f0 of each sample (T,) in Hz with 0 where it breathes, and phone of each unit."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    voice = np.random.default_rng(zlib.crc32(speaker.encode()))
    samples = int(rng.uniform(*seconds) * sample_rate)
    t = np.arange(samples) / sample_rate
    glide = rng.uniform(-5, 5) * t / t[-1] + 0.3 * np.sin(2 * np.pi * 5.5 * t)  # semitones
    f0 = voice.uniform(130, 260) * 2 ** ((rng.uniform(-4, 4) + glide) / 12)
    sung = (t > 0.08) & (t < t[-1] - 0.08)
    phones = rng.integers(_PHONES, size=int(t[-1] / _PHONE_S) + 1)
    phone = phones[(t / _PHONE_S).astype(int)]
    formants = np.stack([np.geomspace(300, 900, _PHONES), np.geomspace(2400, 900, _PHONES)])
    phase = 2 * np.pi * np.cumsum(f0) / sample_rate
    wav = 0.003 * rng.standard_normal(samples)
    for harmonic in range(1, 13):
        hz = harmonic * f0
        shape = sum(np.exp(-(((hz - each[phone]) / 250) ** 2)) for each in formants) + 0.1
        wav += sung * (hz < sample_rate / 2) * 0.1 * shape * np.sin(harmonic * phase)
    units = max(1, samples * UNIT_RATE // sample_rate)
    told = phone[np.minimum(np.arange(units) * sample_rate // UNIT_RATE, samples - 1)]
    return {"wav": wav.astype(np.float32), "f0": f0 * sung, "phones": told, "rng": rng}


def _row(
    speaker: str, song: str, index: int, count: int, clip: dict[str, Any], footer: Footer
) -> dict[str, Any]:
    (identity,) = footer.encoders
    table = np.random.default_rng(7).standard_normal((_PHONES, identity.dim))
    units = table[clip["phones"]]
    units = units + 0.05 * clip["rng"].standard_normal(units.shape)
    samples = len(clip["wav"])
    f0 = clip["f0"][:: footer.hop_length][: samples // footer.hop_length].astype(np.float32)
    measures = dict.fromkeys(("loudness_lufs", "gain_db", "peak_db"), 0.0)
    measures |= dict.fromkeys(QUALITY_COLUMNS, 0.0)
    return {
        "clip_id": f"{song}#{index:06d}",
        "song_id": song,
        "speaker": speaker,
        "clip_index": index,
        "clip_count": count,
        "start": index * samples,
        "stop": (index + 1) * samples,
        "audio": {
            "bytes": encode_flac(quantise(clip["wav"], "PCM_16"), footer.sample_rate, "PCM_16"),
            "path": f"{song}#{index:06d}.flac",
        },
        "sample_rate": footer.sample_rate,
        "num_samples": samples,
        "f0": f0,
        identity.column: pack_units(units.astype(np.float32)),
        identity.frames_column: len(units),
        **measures,
    }
