"""`index`: a faiss index of the units of each speaker of a dataset (stages/retrieval.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from models.synthesizer.config import require_at_least
from pipeline.cluster.bar import show_bar
from pipeline.dataset.shards import read_supported_info
from pipeline.dataset.unit_frames import UnitDataConfig, UnitFrames, find_units
from pipeline.errors import UserError
from pipeline.reports.command_summary import Summary
from pipeline.storage.atomic import commit_file
from stages.retrieval import IndexFault, IndexNote, import_faiss, index_files, note_to_json

_FEW = 10_000  # fewer vectors are searched exactly, which is fast enough
_MOST_TRAINING = 262_144  # vectors that the centres of the lists are trained on
_PER_LIST = 39  # training vectors for each list, the least that faiss accepts without a warning


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of the index. nprobe: lists that a search looks into.

    max_vectors: most frames of a speaker; more are sampled at random. They are in memory as
    float32.
    """

    max_vectors: int = 1_000_000
    nprobe: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, "index.max_vectors", self.max_vectors)
        require_at_least(1, "index.nprobe", self.nprobe)
        require_at_least(0, "index.seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Every setting of `index`."""

    data: UnitDataConfig = field(default_factory=UnitDataConfig)
    index: IndexConfig = field(default_factory=IndexConfig)


def make_indexes(
    dataset: Path, out: Path, settings: IndexSettings, console: Console
) -> list[IndexNote]:
    """Write two files for each speaker into the folder `out`; files of other speakers stay.

    Raises: UserError: when faiss is not installed, or there is nothing to index.
    """
    data, cfg = settings.data, settings.index
    try:
        faiss = import_faiss()
    except IndexFault as error:
        raise UserError(str(error)) from error
    fingerprint = read_supported_info(dataset)["fingerprint"]
    units = find_units(dataset, data.encoder, data.split)
    speakers = units.speakers if data.speaker is None else [data.speaker]
    parts = [units.of(speaker) for speaker in speakers]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name the folder to write the indexes into")
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    notes = []
    steps = sum(min(part.total, cfg.max_vectors) for part in parts)
    with show_bar(console, "frames indexed", steps) as advance:
        for part in parts:
            index, kind = _build(faiss, part, cfg, advance)
            notes.append(_write(faiss, index, kind, part, out, cfg, fingerprint))
    with contextlib.suppress(OSError):
        (out / ".tmp").rmdir()
    return notes


def _build(
    faiss: Any, units: UnitFrames, cfg: IndexConfig, advance: Callable[[int], None]
) -> tuple[Any, str]:
    """The filled index of one speaker, and its factory string."""
    vectors = min(units.total, cfg.max_vectors)
    kind = index_kind(vectors)
    index = faiss.index_factory(units.encoder.dim, kind)
    if not index.is_trained:
        index.train(units.sample(min(vectors, _MOST_TRAINING), cfg.seed))
        index.nprobe = cfg.nprobe
    for block in units.sampled_blocks(vectors, cfg.seed):
        index.add(block)
        advance(len(block))
    return index, kind


def index_kind(vectors: int) -> str:
    """Return the factory string of faiss: RVC's number of lists, or "Flat" for few vectors."""
    if vectors < _FEW:
        return "Flat"
    lists = min(int(16 * math.sqrt(vectors)), min(vectors, _MOST_TRAINING) // _PER_LIST)
    return f"IVF{lists},Flat"


def _write(
    faiss: Any,
    index: Any,
    kind: str,
    units: UnitFrames,
    out: Path,
    cfg: IndexConfig,
    fingerprint: str,
) -> IndexNote:
    """Write the index, then its note with the index's SHA-256.

    `load_index` refuses a pair that does not match, such as one left by a crash.
    """
    assert units.speaker is not None
    index_path, note_path = index_files(out, units.speaker)
    digest = hashlib.sha256()

    def write_index(file: BinaryIO) -> None:
        def write(data: bytes) -> int:
            digest.update(data)
            return file.write(data)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))

    out.mkdir(parents=True, exist_ok=True)
    commit_file(out, index_path.name, write_index)
    note = IndexNote(
        encoder=units.encoder.name,
        checkpoint_sha256=units.encoder.checkpoint_sha256,
        dim=units.encoder.dim,
        speaker=units.speaker,
        vectors=index.ntotal,
        frames=units.total,
        kind=kind,
        nprobe=cfg.nprobe if kind != "Flat" else None,
        seed=cfg.seed,
        faiss_version=faiss.__version__,
        dataset_fingerprint=fingerprint,
        sha256=digest.hexdigest(),
    )
    commit_file(out, note_path.name, lambda file: file.write(note_to_json(note).encode()))
    return note


def index_summary(notes: list[IndexNote], out: Path) -> Summary:
    """Return frames, encoder and kind of each speaker's index."""
    lines = []
    for note in notes:
        sampled = f" (sampled from {note.frames})" if note.vectors < note.frames else ""
        frames = f"{note.vectors} frames of {note.encoder}{sampled}"
        lines.append(f"{note.speaker}: {frames}, {note.kind}")
    return Summary(
        parts=[*lines, f"indexes in {out}"],
        figures={"folder": str(out), "indexes": [dataclasses.asdict(note) for note in notes]},
    )
