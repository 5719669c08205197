"""Checks of clips in a shard: their ids and lengths against its ledger, their audio.

Tested by tests/pipeline/dataset/test_verify.py, tests/pipeline/extract/test_from_dataset.py.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import soundfile as sf

from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import AUDIO_SCHEMA, PITCH_SCHEMA, clip_name
from pipeline.dataset.shards import Footer
from pipeline.errors import one_line
from stages.flac import decode_flac

_TYPES = {field.name: field.type for field in (*AUDIO_SCHEMA, *PITCH_SCHEMA)}
IDENTITY_COLUMNS = (
    "clip_id",
    "song_id",
    "speaker",
    "clip_index",
    "clip_count",
    "start",
    "stop",
    "sample_rate",
    "num_samples",
)


def require_columns(clips: pa.Table, names: Sequence[str]) -> None:
    """Check that a table has these columns of a shard, of the right types and without empty cells.

    Raises: ValueError: when it does not.
    """
    clips.validate(full=True)
    for name in names:
        if name not in clips.schema.names:
            raise ValueError(f"it has no column {name}")
        if name in _TYPES and clips.schema.field(name).type != _TYPES[name]:
            raise ValueError(f"its column {name} is {clips.schema.field(name).type}")
    if has_nulls(clips):
        raise ValueError("it has empty cells")


def has_nulls(clips: pa.Table) -> bool:
    """Tell whether cells are empty, other than the paths of audio, which readers do not need."""
    cells = clips.flatten()  # also finds audio.bytes
    return any(cells[name].null_count for name in cells.column_names if name != "audio.path")


def identity_faults(clips: pa.Table, footer: Footer) -> Iterator[str]:
    """Yield what in the rows of a shard disagrees with its ledger and with how ids are made.

    clips: has IDENTITY_COLUMNS, of all rows.
    """
    entries = {entry.song_id: entry for entry in footer.ledger}
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in clips.select(IDENTITY_COLUMNS).to_pylist():
        if row["song_id"] not in entries:
            yield f"{row['clip_id']}: its song {row['song_id']} is not in the ledger"
        else:
            rows[row["song_id"]].append(row)
    for song_id, entry in entries.items():
        yield from _song_faults(entry, rows[song_id], footer.sample_rate)


def _song_faults(
    entry: SongEntry, rows: Sequence[Mapping[str, Any]], sample_rate: int
) -> Iterator[str]:
    before = 0
    for number, row in enumerate(rows):
        clip_id = row["clip_id"]
        if clip_id != clip_name(entry.song_id, number) or row["clip_index"] != number:
            yield (
                f"clip {number} of {entry.song_id} has the id {clip_id} and "
                f"clip_index {row['clip_index']}"
            )
        if row["speaker"] != entry.speaker:
            yield f"{clip_id}: its speaker is {row['speaker']}, in the ledger {entry.speaker}"
        if row["clip_count"] != len(rows):
            yield f"{clip_id}: clip_count is {row['clip_count']}, but the song has {len(rows)}"
        if row["sample_rate"] != sample_rate:
            yield f"{clip_id}: sample_rate is {row['sample_rate']}, in the footer {sample_rate}"
        if row["stop"] - row["start"] != row["num_samples"] or row["start"] < before:
            yield f"{clip_id}: samples {row['start']} to {row['stop']} are no span after {before}"
        before = row["stop"]
    if len(rows) != entry.clips:
        yield f"{entry.song_id}: {len(rows)} rows, but {entry.clips} clips in the ledger"
    kept_s = sum(row["num_samples"] for row in rows) / sample_rate
    if abs(kept_s - entry.kept_s) > 1e-6 * max(1.0, kept_s):
        yield f"{entry.song_id}: {kept_s:.6f} s in its rows, {entry.kept_s:.6f} s in the ledger"


def audio_faults(clips: pa.Table, footer: Footer) -> Iterator[str]:
    """Yield the clips whose audio does not decode to the promised samples. Decodes each in turn."""
    names, lengths = clips["clip_id"].to_pylist(), clips["num_samples"].to_pylist()
    flac = pc.struct_field(clips["audio"], "bytes")
    for clip_id, data, num_samples in zip(names, flac, lengths, strict=True):
        fault = audio_fault(data.as_py(), num_samples, footer)
        if fault is not None:
            yield f"{clip_id}: {fault}"


def audio_fault(flac: bytes, num_samples: int, footer: Footer) -> str | None:
    """Return what is wrong with the audio of a clip: it does not decode, or has another length."""
    try:
        with sf.SoundFile(io.BytesIO(flac)) as file:
            rate = file.samplerate
        samples = decode_flac(flac, footer.subtype)
    except sf.LibsndfileError as error:
        return f"the audio does not decode: {one_line(error)}"
    if samples.ndim != 1 or len(samples) != num_samples:
        return f"{len(samples)} samples decoded, but num_samples is {num_samples}"
    if rate != footer.sample_rate:
        return f"its FLAC is at {rate} Hz, but the footer says {footer.sample_rate} Hz"
    return None
