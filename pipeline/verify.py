"""Reading a dataset back: does every shard hold what its footer and the plan say?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf

from pipeline.config import fingerprint
from pipeline.errors import UserError
from pipeline.ledger import Account, SongEntry, entry_record, take_account
from pipeline.plan import load_plan
from pipeline.shards import (
    ROW_GROUP_CLIPS,
    Footer,
    iter_shards,
    read_dataset_info,
    read_footer,
    shard_schema,
)
from stages.flac import decode_flac
from stages.frames import num_frames

_MOST_PROBLEMS = 20  # of one shard


@dataclass
class Verification:
    """What `verify` found. The dataset is whole when `problems` is empty."""

    account: Account
    shards: int = 0
    clips: int = 0
    audio_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def verify(dataset: Path, source: Path | None = None) -> Verification:
    """Read every byte of every shard: checksums, schema, rows, ledger, audio, contours, units.

    source: the corpus; its files are hashed and compared with the ledger too.
    """
    info = read_dataset_info(dataset)
    tasks = load_plan(dataset)
    problems = []
    if fingerprint(info["settings"]) != info["fingerprint"]:
        problems.append("dataset.json: the fingerprint is not that of its settings")
    footers: list[tuple[Footer, int]] = []
    seen: set[str] = set()
    result = Verification(Account())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, checked in zip(
            paths := iter_shards(dataset), pool.map(_check_shard, paths), strict=True
        ):
            if isinstance(checked, UserError):
                problems.append(str(checked))
                continue
            footer, clip_ids, audio_s, found = checked
            if footer.fingerprint != info["fingerprint"]:
                found.append("made with other settings than dataset.json says")
            if tasks.get(footer.task) is None or tasks[footer.task].shard_name != path.name:
                found.append(f"holds task {footer.task}, which its name does not")
            found += [f"clip {clip_id} is in another shard too" for clip_id in clip_ids & seen]
            problems += [f"{path.name}: {words}" for words in found[:_MOST_PROBLEMS]]
            seen |= clip_ids
            footers.append((footer, len(clip_ids)))
            result.shards += 1
            result.audio_s += audio_s
    missing = sorted(set(tasks) - {footer.task for footer, _ in footers})
    if missing:
        problems.append(f"{len(missing)} of {len(tasks)} tasks are not done; extract resumes them")
    result.account = take_account(list(tasks.values()), footers)
    result.clips = len(seen)
    result.problems = problems + result.account.problems
    if source is not None:
        result.problems += _compare_source(dataset, source, result.account)
    return result


def _check_shard(path: Path) -> tuple[Footer, set[str], float, list[str]] | UserError:
    try:
        footer = read_footer(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            problems = []
            expected = shard_schema(footer.encoders, footer.sample_rate)
            if not file.schema_arrow.equals(expected):
                problems.append("its columns are not those of the format")
                return footer, set(), 0.0, problems
            clip_ids: list[str] = []
            samples = 0
            for batch in file.iter_batches(ROW_GROUP_CLIPS):
                for row in batch.to_pylist():
                    clip_ids.append(row["clip_id"])
                    samples += row["num_samples"]
                    problems += [f"{row['clip_id']}: {w}" for w in _check_clip(row, footer)]
    except (pa.ArrowException, OSError) as error:
        return UserError(f"{path.name} cannot be read: {error}")
    except UserError as error:
        return error
    if len(set(clip_ids)) != len(clip_ids):
        problems.append("a clip_id occurs twice")
    return footer, set(clip_ids), samples / footer.sample_rate, problems


def _check_clip(row: dict[str, Any], footer: Footer) -> Iterator[str]:
    try:
        samples = decode_flac(row["audio"]["bytes"], footer.subtype)
    except sf.LibsndfileError as error:
        yield f"the audio does not decode: {error}"
        return
    if samples.ndim != 1 or not len(samples) == row["num_samples"] == row["stop"] - row["start"]:
        yield f"{len(samples)} samples decoded, {row['num_samples']} promised"
    frames = num_frames(row["num_samples"], footer.hop_length)
    f0 = np.asarray(row["f0"], dtype=np.float32)
    if len(f0) != frames:
        yield f"f0 has {len(f0)} frames, not {frames}"
    if not np.isfinite(f0).all() or (f0 < 0).any():
        yield "f0 is not finite or below 0"
    for encoder in footer.encoders:
        width = encoder.dim * np.dtype(encoder.dtype).itemsize
        if len(row[encoder.column]) != width * row[encoder.frames_column]:
            yield f"{encoder.column} does not hold {row[encoder.frames_column]} frames"
        if not np.isfinite(np.frombuffer(row[encoder.column], encoder.dtype)).all():
            yield f"{encoder.column} is not finite"


def _compare_source(dataset: Path, source: Path, account: Account) -> list[str]:
    root = source if source.is_dir() else source.parent
    paths = {s.song_id: s.path for task in load_plan(dataset).values() for s in task.songs}
    problems = []
    for entry in account.entries.values():
        if entry.sha256 is None:
            continue
        try:
            with open(os.path.join(os.fsencode(root), paths[entry.song_id]), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    problems.append(f"{entry.song_id}: the file's content changed since")
        except OSError as error:
            problems.append(f"{entry.song_id}: {error.strerror}")
    return problems


def export_ledger(account: Account, path: Path) -> None:
    """Write one row a song to a .csv or .parquet file."""
    entries: list[SongEntry] = sorted(account.entries.values(), key=lambda e: (e.status, e.song_id))
    table = pd.DataFrame([entry_record(entry) for entry in entries])
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        raise UserError(f"{path}: the ledger is written as .csv or .parquet")
