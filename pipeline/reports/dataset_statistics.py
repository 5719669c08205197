"""Statistics of a dataset, read from its shards, and the clips that its page plays.

Shards are read one after the other, scalar columns and f0 only. Histograms and a few numbers per
clip stay in memory. Audio is read for the chosen clips only.
Tested by tests/pipeline/reports/test_dataset_page.py.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
from numpy.typing import NDArray

from pipeline.dataset.account import Account, balance_dataset
from pipeline.dataset.clip_checks import audio_fault, require_columns
from pipeline.dataset.schema import QUALITY_COLUMNS
from pipeline.dataset.shards import (
    Footer,
    iter_shards,
    read_dataset_info,
    read_footers,
    require_supported,
    require_whole,
)
from pipeline.errors import UserError, one_line
from pipeline.songs.plan import load_plan
from stages.types import Array

BINS_PER_SEMITONE = 4  # pitch histograms: MIDI note numbers 0 to 128 in quarter semitones
PITCH_BINS = 128 * BINS_PER_SEMITONE

_COLUMNS = ("clip_id", "song_id", "speaker", "num_samples", "f0", "loudness_lufs", "gain_db")
_PLAYED_CLIPS = 3
_PLAYED_CLIP_S = 6.0  # clips near this length are preferred

Floats = NDArray[np.float64]


@dataclass
class SpeakerStatistics:
    """Clips of one speaker. pitch: voiced frames by quarter semitone, (PITCH_BINS,)."""

    clips: int = 0
    samples: int = 0
    pitch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(PITCH_BINS, np.int64))
    candidates: list[_Candidate] = field(default_factory=list)


@dataclass(frozen=True, order=True)
class _Candidate:
    """A clip that the page may play; the smallest is the first choice."""

    distance: int  # samples from the preferred length
    clip_id: str
    shard: str
    row: int


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of all clips.

    measures: quality columns by name, (clips,) each, NaN where a shard does not have the column.
    """

    info: dict[str, Any]
    account: Account
    speakers: dict[str, SpeakerStatistics]
    lengths_s: Floats  # (clips,)
    loudness_lufs: Floats
    gain_db: Floats
    measures: Mapping[str, Floats]
    environments: list[dict[str, str]]


@dataclass(frozen=True)
class PlayedClip:
    """A clip that the page plays and draws. row: its measures by column."""

    clip_id: str
    speaker: str
    flac: bytes
    wav: Array  # (T,)
    sample_rate: int
    f0: Array  # (F,) Hz, 0 = unvoiced
    hop_length: int
    row: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return len(self.wav) / self.sample_rate

    @property
    def f0_range(self) -> tuple[float, float] | None:
        """Lowest and highest f0 in Hz; None when nothing is voiced."""
        voiced = self.f0[self.f0 > 0]
        return (float(voiced.min()), float(voiced.max())) if len(voiced) else None


def read_statistics(dataset: Path) -> DatasetStatistics:
    """Read all shards; those that cannot be read are named in the account's problems.

    Raises: UserError: when `dataset` is not a dataset or has a schema that is not supported.
    """
    info = read_dataset_info(dataset)
    require_supported(dataset, info, oldest=1)
    require_whole(dataset, info)
    tasks = load_plan(dataset)
    speakers: dict[str, SpeakerStatistics] = defaultdict(SpeakerStatistics)
    columns: dict[str, list[Floats]] = defaultdict(list)
    footers: list[tuple[Footer, int]] = []
    environments: list[dict[str, str]] = []
    problems: list[str] = []
    for path, footer in read_footers(iter_shards(dataset)):
        if isinstance(footer, UserError):
            problems.append(str(footer))
            continue
        try:
            table = _read_columns(path, (*_COLUMNS, *QUALITY_COLUMNS))
        except (pa.ArrowException, OSError, ValueError) as error:
            problems.append(f"{path.name} cannot be read: {one_line(error)}")
            continue
        _add_shard(table, path.name, footer.sample_rate, speakers)
        columns["lengths_s"].append(_floats(table["num_samples"]) / footer.sample_rate)
        for name in ("loudness_lufs", "gain_db", *QUALITY_COLUMNS):
            present = name in table.column_names
            column = _floats(table[name]) if present else np.full(table.num_rows, np.nan)
            columns[name].append(column)
        footers.append((footer, table.num_rows))
        if footer.environment not in environments:
            environments.append(footer.environment)
    account = balance_dataset(list(tasks.values()), footers)
    account.problems = problems + account.problems
    values = {name: np.concatenate(parts) for name, parts in columns.items()}
    return DatasetStatistics(
        info=info,
        account=account,
        speakers=dict(speakers),
        lengths_s=values.get("lengths_s", np.zeros(0)),
        loudness_lufs=values.get("loudness_lufs", np.zeros(0)),
        gain_db=values.get("gain_db", np.zeros(0)),
        measures={name: values[name] for name in QUALITY_COLUMNS if name in values},
        environments=environments,
    )


def _read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Read those of the columns that the shard has."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read(columns=[name for name in names if name in file.schema_arrow.names])
    require_columns(table, _COLUMNS)
    return table


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _add_shard(
    table: pa.Table, shard: str, sample_rate: int, speakers: dict[str, SpeakerStatistics]
) -> None:
    """Add the clips of one shard to their speakers' statistics."""
    if table.num_rows == 0:
        return
    names = table["speaker"].to_pylist()
    samples = _floats(table["num_samples"]).astype(np.int64)
    contours = table["f0"].combine_chunks()
    f0 = np.asarray(contours.flatten(), dtype=np.float64)
    frames = np.asarray(contours.value_lengths())
    distance = np.abs(samples - int(_PLAYED_CLIP_S * sample_rate))
    for name in sorted(set(names)):
        own = np.array([other == name for other in names])
        speaker = speakers[name]
        speaker.clips += int(own.sum())
        speaker.samples += int(samples[own].sum())
        hz = f0[np.repeat(own, frames)]
        midi = 69 + 12 * np.log2(hz[hz > 0] / 440)
        bins = np.clip(np.rint(midi * BINS_PER_SEMITONE), 0, PITCH_BINS - 1).astype(np.int64)
        speaker.pitch += np.bincount(bins, minlength=PITCH_BINS)
        rows = [int(row) for row in np.flatnonzero(own)]
        for row in sorted(rows, key=lambda row: distance[row])[:_PLAYED_CLIPS]:
            clip_id = table["clip_id"][row].as_py()
            speaker.candidates.append(_Candidate(int(distance[row]), clip_id, shard, row))
        speaker.candidates = sorted(speaker.candidates)[:_PLAYED_CLIPS]


def pitch_percentiles(pitch: NDArray[np.int64], percents: Sequence[float]) -> list[float]:
    """Return the MIDI note numbers that those percentages of the voiced frames do not exceed.

    pitch: a histogram (PITCH_BINS,) with at least one frame.
    """
    cumulated = np.cumsum(pitch)
    at = np.searchsorted(cumulated, np.array(percents) / 100 * cumulated[-1])
    return [float(index) / BINS_PER_SEMITONE for index in at]


def by_length(speakers: Mapping[str, SpeakerStatistics]) -> list[str]:
    """Return the names of the speakers, the one with most audio first."""
    return sorted(speakers, key=lambda name: (-speakers[name].samples, name))


# ---- clips to play ------------------------------------------------------------------------------


def read_played_clips(dataset: Path, statistics: DatasetStatistics) -> list[PlayedClip]:
    """Read up to three clips; one that cannot be read is added to the account's problems.

    Raises: UserError: when a shard has changed since `read_statistics`.
    """
    clips = []
    for speaker, candidate in _choose(statistics.speakers):
        try:
            clips.append(_read_clip(dataset, speaker, candidate))
        except (pa.ArrowException, OSError, ValueError) as error:
            statistics.account.problems.append(
                f"{candidate.clip_id} cannot be read: {one_line(error)}"
            )
    return clips


def _choose(speakers: Mapping[str, SpeakerStatistics]) -> list[tuple[str, _Candidate]]:
    """Choose one clip of each speaker, most audio first, before a second of any."""
    order = by_length(speakers)
    rounds = [
        (name, speakers[name].candidates[turn])
        for turn in range(_PLAYED_CLIPS)
        for name in order
        if turn < len(speakers[name].candidates)
    ]
    return rounds[:_PLAYED_CLIPS]


def _read_clip(dataset: Path, speaker: str, candidate: _Candidate) -> PlayedClip:
    path = dataset / "data" / candidate.shard
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        present = file.schema_arrow.names
        measures = [name for name in ("gain_db", *QUALITY_COLUMNS) if name in present]
        footer = Footer.from_json(file.metadata.metadata[b"cantor"].decode())
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if candidate.row < first + rows:
                table = file.read_row_group(
                    group, columns=["audio", "f0", "num_samples", *measures]
                )
                break
            first += rows
        else:
            raise UserError(f"{path} changed while it was read; run `cantor report` again")
    row = table.slice(candidate.row - first, 1).to_pylist()[0]
    require_columns(table, ("audio", "f0"))
    flac = row["audio"]["bytes"]
    fault = audio_fault(flac, row["num_samples"], footer)
    if fault is not None:
        raise ValueError(fault)
    wav, sample_rate = sf.read(io.BytesIO(flac), dtype="float32")
    return PlayedClip(
        clip_id=candidate.clip_id,
        speaker=speaker,
        flac=flac,
        wav=wav,
        sample_rate=sample_rate,
        f0=np.asarray(row["f0"], dtype=np.float32),
        hop_length=footer.hop_length,
        row={name: row[name] for name in measures},
    )
