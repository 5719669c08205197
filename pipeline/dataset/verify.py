"""Verification of a dataset: every shard must hold what its footer and the plan say.

Tested by tests/pipeline/dataset/test_shards.py.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.account import Account, balance_dataset
from pipeline.dataset.clip_checks import IDENTITY_COLUMNS, audio_fault, has_nulls, identity_faults
from pipeline.dataset.ledger import SongEntry, entry_record
from pipeline.dataset.schema import XVECTOR_COLUMN, EncoderIdentity, shard_schema
from pipeline.dataset.shards import (
    ROW_GROUP_CLIPS,
    Footer,
    iter_shards,
    read_footer,
    read_supported_info,
    shard_writer,
)
from pipeline.errors import UserError, one_line, printable
from pipeline.fingerprint import fingerprint
from pipeline.songs.corpus import song_ids_of
from pipeline.songs.plan import load_plan
from pipeline.songs.source_file import hash_source
from stages.errors import BadInput
from stages.frames import num_frames
from stages.units import unpack_ids

_MOST_PROBLEMS = 20  # of one shard


@dataclass
class Verification:
    """The result of `verify`. The dataset is complete and sound when `problems` is empty."""

    account: Account
    shards: int = 0
    clips: int = 0
    audio_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def verify(dataset: Path, source: Path | None = None) -> Verification:
    """Read every byte of every shard: checksums, schema, rows, ledger, audio, contours, units.

    source: the corpus; its files are hashed and compared with the ledger too.
    Raises: UserError: when `dataset` is not a dataset of Cantor, or has another format.
    """
    info = read_supported_info(dataset)
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
            footer, clip_ids, audio_s, faults = checked
            if footer.fingerprint != info["fingerprint"]:
                faults.append("made with other settings than dataset.json says")
            if tasks.get(footer.task) is None or tasks[footer.task].shard_name != path.name:
                faults.append(f"holds task {footer.task}, which its name does not")
            faults += [f"clip {clip_id} is in another shard too" for clip_id in clip_ids & seen]
            problems += [f"{path.name}: {words}" for words in faults[:_MOST_PROBLEMS]]
            seen |= clip_ids
            footers.append((footer, len(clip_ids)))
            result.shards += 1
            result.audio_s += audio_s
    for song in (song for task in tasks.values() for song in task.songs):
        if song.song_id not in song_ids_of(song.path):
            problems.append(f"plan: {song.song_id} is not the id of a song at {song.path!r}")
    missing = sorted(set(tasks) - {footer.task for footer, _ in footers})
    if missing:
        problems.append(f"{len(missing)} of {len(tasks)} tasks are not done; extract resumes them")
    result.account = balance_dataset(list(tasks.values()), footers)
    result.clips = len(seen)
    result.problems = problems + result.account.problems
    if source is not None:
        result.problems += _compare_source(dataset, source, result.account)
    return result


def _check_shard(path: Path) -> tuple[Footer, set[str], float, list[str]] | UserError:
    try:
        footer = read_footer(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            problems = _check_metadata(file, footer)
            if problems:
                return footer, set(), 0.0, problems
            identities = []
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                if has_nulls(table):
                    problems.append("it has empty cells")
                    return footer, set(), 0.0, problems
                if _statistics(file.metadata, number) != _statistics_of(table, footer):
                    problems.append(f"row group {number}: its statistics are not those of its rows")
                identities.append(table.select(IDENTITY_COLUMNS))
                for row in table.to_pylist():
                    problems += [f"{row['clip_id']}: {w}" for w in _check_clip(row, footer)]
            clips = pa.concat_tables(identities) if identities else file.schema_arrow.empty_table()
            if len(clips) != file.metadata.num_rows:
                problems.append(f"{len(clips)} rows, but its footer says {file.metadata.num_rows}")
            problems += identity_faults(clips, footer)
    except (pa.ArrowException, OSError, ValueError) as error:
        return UserError(f"{path.name} cannot be read: {one_line(error)}")
    except UserError as error:
        return error
    clip_ids = set(clips["clip_id"].to_pylist())
    if len(clip_ids) != len(clips):
        problems.append("a clip_id occurs twice")
    audio_s = (pc.sum(clips["num_samples"]).as_py() or 0) / footer.sample_rate
    return footer, clip_ids, audio_s, problems


def _check_metadata(file: pq.ParquetFile, footer: Footer) -> list[str]:
    """Compare the columns, features and rows in the Parquet footer with the format."""
    expected = shard_schema(
        footer.encoders, footer.sample_rate, footer.xvector, footer.schema_version
    )
    sink = io.BytesIO()
    shard_writer(sink, footer).close()
    if not file.schema_arrow.equals(expected) or not file.schema.equals(
        pq.read_metadata(sink).schema
    ):
        return [f"its columns are not those of schema version {footer.schema_version}"]
    entries = dict(file.metadata.metadata)
    # Arrow keeps the schema, with both entries, a second time.
    copy = base64.b64decode(entries.pop(b"ARROW:schema", b""), validate=True)
    arrow = pa.ipc.read_schema(pa.py_buffer(copy))
    expected = expected.with_metadata({**expected.metadata, b"cantor": footer.to_json().encode()})
    problems = []
    if entries != expected.metadata:
        problems.append("its 'huggingface' metadata is not that of the format")
    if not arrow.equals(expected, check_metadata=True):
        problems.append("its 'ARROW:schema' metadata is not that of the format")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if sum(groups) != file.metadata.num_rows or not all(0 < n <= ROW_GROUP_CLIPS for n in groups):
        problems.append(
            f"row groups of {groups} rows, but its footer says {file.metadata.num_rows}"
        )
    return problems


def _statistics(metadata: pq.FileMetaData, number: int) -> list[tuple[Any, ...]]:
    """Return the statistics of each column of a row group, by which readers skip row groups."""
    group = metadata.row_group(number)
    columns: list[tuple[Any, ...]] = []
    for i in range(group.num_columns):
        column = group.column(i)
        if column.physical_type != metadata.schema.column(i).physical_type:
            return []  # pyarrow ends the process when asked for statistics of another type
        statistics = column.statistics and column.statistics.to_dict()
        columns.append((column.path_in_schema, column.num_values, column.compression, statistics))
    return columns


def _statistics_of(table: pa.Table, footer: Footer) -> list[tuple[Any, ...]]:
    """Return the statistics that a table has when it is written again."""
    sink = io.BytesIO()
    with shard_writer(sink, footer) as writer:
        writer.write_table(table.cast(writer.schema))
    return _statistics(pq.read_metadata(sink), 0)


def _check_clip(row: dict[str, Any], footer: Footer) -> Iterator[str]:
    fault = audio_fault(row["audio"]["bytes"], row["num_samples"], footer)
    if fault is not None:
        yield fault
    if row["audio"]["path"] != f"{row['clip_id']}.flac":
        yield f"its audio has the path {row['audio']['path']}"
    frames = num_frames(row["num_samples"], footer.hop_length)
    f0 = np.asarray(row["f0"], dtype=np.float32)
    if len(f0) != frames:
        yield f"f0 has {len(f0)} frames, not {frames}"
    if not np.isfinite(f0).all() or (f0 < 0).any():
        yield "f0 is not finite or below 0"
    for encoder in footer.encoders:
        yield from _check_units(row, encoder)
    if footer.xvector is not None:
        embedding = np.asarray(row[XVECTOR_COLUMN], dtype=np.float32)
        if len(embedding) != footer.xvector.dim or not np.isfinite(embedding).all():
            yield f"its xvector is not {footer.xvector.dim} finite numbers"


def _check_units(row: dict[str, Any], encoder: EncoderIdentity) -> Iterator[str]:
    frames = row[encoder.frames_column]
    width = encoder.dim * np.dtype(encoder.dtype).itemsize
    if frames < 1 or len(row[encoder.column]) != width * frames:
        yield f"{encoder.column} does not hold {frames} frames"
    elif encoder.codebook_size is not None:
        ids = unpack_ids(row[encoder.column])
        if ids.min() < 0 or ids.max() >= encoder.codebook_size:
            yield f"{encoder.column} holds ids beyond its {encoder.codebook_size} centres"
    elif not np.isfinite(np.frombuffer(row[encoder.column], encoder.dtype)).all():
        yield f"{encoder.column} is not finite"


def _compare_source(dataset: Path, source: Path, account: Account) -> list[str]:
    root = source if source.is_dir() else source.parent
    paths = {s.song_id: s.path for task in load_plan(dataset).values() for s in task.songs}
    problems = []
    for entry in account.entries.values():
        if entry.sha256 is None:
            continue
        try:
            _, sha256 = hash_source(os.path.join(os.fsencode(root), paths[entry.song_id]))
        except BadInput as fault:
            problems.append(f"{entry.song_id}: {fault.detail}")
        except OSError as error:
            problems.append(f"{entry.song_id}: {error.strerror}")
        else:
            if sha256 != entry.sha256:
                problems.append(f"{entry.song_id}: the file's content changed since")
    return problems


def check_export(path: Path) -> None:
    """Check that `export_ledger` can write a file of this name.

    Raises: UserError: when it ends in neither .csv nor .parquet.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path} must end in .csv or .parquet")


def export_ledger(account: Account, path: Path) -> None:
    """Write one row for each song to a .csv or .parquet file; create its folder.

    In .csv, text is as a spreadsheet may show it: control characters are escaped, and a cell that a
    spreadsheet would take for a formula starts with an apostrophe.
    """
    check_export(path)
    entries: list[SongEntry] = sorted(account.entries.values(), key=lambda e: (e.status, e.song_id))
    table = pd.DataFrame([entry_record(entry) for entry in entries])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.map(_spreadsheet_cell).to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)


def _spreadsheet_cell(value: object) -> object:
    """Return a cell that no spreadsheet runs as a formula. Numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text
