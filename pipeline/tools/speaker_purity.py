"""`purity`: similarity of each clip to its speaker, by the clips' embeddings (x-vectors)."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from soundfile import LibsndfileError

from pipeline.cluster.bar import show_bar
from pipeline.cluster.device import choose_device
from pipeline.dataset.decoded_clips import DecodedClips
from pipeline.dataset.folder import open_folder
from pipeline.dataset.prefetch import read_ahead
from pipeline.dataset.row_groups import RowGroups, read_row_groups
from pipeline.dataset.schema import XVECTOR_COLUMN
from pipeline.dataset.shards import Footer, read_supported_info
from pipeline.errors import UserError
from pipeline.reports.command_summary import MOST_LINES, Summary, text_table
from pipeline.storage.atomic import commit_file, temporary_folder
from stages.xvector import XvectorConfig, embed_clips

SIDECAR = "purity.parquet"

_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("speaker", pa.string()),
        ("cosine", pa.float32()),
        ("own", pa.bool_()),
        ("nearest_speaker", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class PuritySettings:
    """Every setting of `purity`. xvector: the model that embeds; the default reads the shards."""

    xvector: XvectorConfig = field(default_factory=XvectorConfig)


@dataclass
class SpeakerPurity:
    """Purity of one speaker. strays: clips that are nearer to another speaker.

    cosines: similarity of each clip to the speaker's other clips; empty for a speaker of one clip.
    """

    speaker: str
    clips: int = 0
    strays: int = 0
    cosines: array[float] = field(default_factory=lambda: array("f"))

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.cosines)) if self.cosines else None

    @property
    def low(self) -> float | None:
        """The 5th percentile."""
        return float(np.percentile(self.cosines, 5)) if self.cosines else None


class Embed(Protocol):
    """Return the vectors (N, E) of the clips of a row group."""

    def __call__(self, rows: pa.Table, footer: Footer) -> NDArray[np.float32]: ...


def measure_purity(
    dataset: Path, settings: PuritySettings, console: Console
) -> list[SpeakerPurity]:
    """Write DATASET/purity.parquet: one row for each clip of every split, in shard order.

    A clip's cosine is its similarity to the centroid of its speaker's other clips: the mean of
    their vectors, each of length 1. The clip itself is excluded; otherwise every clip of a speaker
    with few clips would look pure. For a speaker's only clip, cosine is null and own is true.

    Raises: UserError: when there are no vectors, or no clips.
    """
    info = read_supported_info(dataset)
    row_groups, rows = read_row_groups(open_folder(dataset), None, lambda _: ["speaker"])
    stored = row_groups.footer.xvector
    if settings.xvector.checkpoint is not None:
        column = "audio"
        embed, sha256 = _embedder(dataset, settings.xvector.checkpoint, settings.xvector.device)
    elif stored is not None:
        column, embed, sha256 = XVECTOR_COLUMN, _stored, stored.checkpoint_sha256
    else:
        raise UserError(
            f"{dataset} has no x-vectors; give xvector.checkpoint=FOLDER to this command or to "
            "`cantor extract` (a speaker model such as microsoft/wavlm-base-plus-sv)"
        )
    clips = len(rows)
    if clips == 0:
        raise UserError(f"{dataset} has no clips")
    with (
        show_bar(console, "clips", 2 * clips) as advance,
        tempfile.TemporaryFile(dir=temporary_folder(dataset)) as spool,
    ):
        sums, counts = _spool_vectors(row_groups, column, embed, spool, advance)
        spool.seek(0)
        notes = {"fingerprint": info["fingerprint"], "checkpoint_sha256": sha256, "clips": clips}
        schema = _SCHEMA.with_metadata({"cantor": json.dumps(notes)})
        speakers = {speaker: SpeakerPurity(speaker) for speaker in sums}

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, schema, compression="ZSTD") as writer:
                for batch in _rows(spool, sums, counts, speakers):
                    writer.write_batch(batch)
                    advance(batch.num_rows)

        commit_file(dataset, SIDECAR, write)
    return sorted(speakers.values(), key=lambda purity: purity.speaker)


def _stored(rows: pa.Table, footer: Footer) -> NDArray[np.float32]:
    assert footer.xvector is not None
    flat = rows[XVECTOR_COLUMN].combine_chunks().flatten().to_numpy()
    return np.asarray(flat, np.float32).reshape(len(rows), footer.xvector.dim)


def _embedder(dataset: Path, checkpoint: str, device: str) -> tuple[Embed, str]:
    from models.checkpoint import sha256_of
    from models.encoders.xvector import load_xvector
    from pipeline.extract.from_dataset import read_source

    path = Path(checkpoint).expanduser()
    try:
        model = load_xvector(path, choose_device(device, "xvector.device"))
        sha256 = sha256_of(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    resampling = read_source(dataset).config.resample

    def embed(rows: pa.Table, footer: Footer) -> NDArray[np.float32]:
        wavs = DecodedClips(rows["audio"], footer.subtype)
        return np.stack(embed_clips(wavs, footer.sample_rate, model, resampling))

    return embed, sha256


def _spool_vectors(
    row_groups: RowGroups,
    column: str,
    embed: Embed,
    spool: BinaryIO,
    advance: Callable[[int], None],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, int]]:
    """Write all vectors, scaled to length 1, to `spool`; return sums (E,) and counts by speaker."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    writer: Any = None
    groups = range(len(row_groups))
    columns = ["clip_id", "speaker", column]
    for group, rows in zip(
        groups, read_ahead(lambda group: row_groups.read(group, columns), groups), strict=True
    ):
        path = row_groups.where(group)
        try:
            vectors = embed(rows, row_groups.footer)
        except (ValueError, LibsndfileError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        units = _normalized(vectors, rows, path)
        speakers = rows["speaker"].to_pylist()
        for speaker, unit in zip(speakers, units, strict=True):
            sums[speaker] = sums.get(speaker, 0.0) + unit
            counts[speaker] = counts.get(speaker, 0) + 1
        batch = pa.record_batch(
            {
                "clip_id": rows["clip_id"].combine_chunks(),
                "speaker": rows["speaker"].combine_chunks(),
                "vector": pa.FixedSizeListArray.from_arrays(units.ravel(), units.shape[1]),
            }
        )
        writer = writer or pa.ipc.new_stream(spool, batch.schema)
        writer.write_batch(batch)
        advance(len(rows))
    writer.close()
    return sums, counts


def _normalized(vectors: NDArray[np.float32], rows: pa.Table, path: str) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    wrong = ~(np.isfinite(lengths) & (lengths > 0))
    if wrong.any():
        clip_id = rows["clip_id"][int(np.argmax(wrong))].as_py()
        raise UserError(
            f"{path}: the x-vector of {clip_id} has no direction (it is zero or not finite)"
        )
    return np.asarray(wide / lengths[:, None])


def _rows(
    spool: BinaryIO,
    sums: dict[str, NDArray[np.float64]],
    counts: dict[str, int],
    speakers: dict[str, SpeakerPurity],
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the sidecar, one batch of the spool at a time, and update `speakers`."""
    names = sorted(sums)
    place = {name: i for i, name in enumerate(names)}
    totals = np.stack([sums[name] for name in names])  # (S, E)
    number = np.array([counts[name] for name in names])
    centroids = _directions(totals)
    for batch in pa.ipc.open_stream(spool):
        units = batch["vector"].flatten().to_numpy().reshape(batch.num_rows, -1)
        own = np.array([place[name] for name in batch["speaker"].to_pylist()])
        alone = number[own] == 1
        cosine = (units * _directions(totals[own] - units)).sum(1)
        to_others = units @ centroids.T  # (N, S)
        to_others[np.arange(len(own)), own] = -np.inf
        other = to_others.argmax(1)
        is_own = alone | (cosine >= to_others.max(1))
        for i, speaker in enumerate(own):
            purity = speakers[names[speaker]]
            purity.clips += 1
            purity.strays += int(not is_own[i])
            if not alone[i]:
                purity.cosines.append(cosine[i])
        nearest = np.where(is_own, own, other)
        yield pa.record_batch(
            [
                batch["clip_id"],
                batch["speaker"],
                pa.array(cosine.astype(np.float32), mask=alone),
                pa.array(is_own),
                pa.array([names[i] for i in nearest]),
            ],
            schema=_SCHEMA,
        )


def _directions(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale rows to length 1; rows of almost zero become zero."""
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(lengths > 1e-12, sums / np.maximum(lengths, 1e-12), 0.0)


def purity_summary(speakers: list[SpeakerPurity], dataset: Path) -> Summary:
    """Return one row for each speaker, the least pure first."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    worst_first = sorted(speakers, key=lambda p: (p.mean is None, p.mean, p.speaker))
    header = ("speaker", "clips", "mean cosine", "5th percentile", "nearer to another")
    rows = [
        (p.speaker, str(p.clips), shown(p.mean), shown(p.low), str(p.strays))
        for p in worst_first[:MOST_LINES]
    ]
    parts: list[str | Table] = [text_table(rows, header)]
    if len(speakers) > MOST_LINES:
        parts.append(f"… and {len(speakers) - MOST_LINES} more speakers")
    clips = sum(p.clips for p in speakers)
    parts.append(f"purity of {clips} clips in {dataset / SIDECAR}")
    figures = [
        {
            "speaker": p.speaker,
            "clips": p.clips,
            "mean_cosine": p.mean,
            "cosine_p5": p.low,
            "nearer_to_another": p.strays,
        }
        for p in worst_first
    ]
    return Summary(
        parts=parts,
        figures={"file": str(dataset / SIDECAR), "clips": clips, "speakers": figures},
    )
