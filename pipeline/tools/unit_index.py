"""`index`: for each speaker of a dataset, a faiss index of their units (stages/retrieval.py)."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from pipeline.cluster.bar import show_bar
from pipeline.dataset.shards import read_dataset_info
from pipeline.dataset.unit_frames import UnitFrames, find_units
from pipeline.errors import UserError
from pipeline.storage.atomic import commit_file
from stages.retrieval import IndexFault, IndexNote, import_faiss, index_files, note_to_json

_FEW = 10_000  # vectors that are searched one by one: exact, and quick enough
_MOST_TRAINING = 262_144  # vectors that the lists' centres are learnt from
_PER_LIST = 39  # faiss wants as many training vectors for each list


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What `index` can be told. max_vectors: for each speaker, in memory as float32; of more, as
    many are drawn at random. nprobe: lists that a search will look into."""

    encoder: str | None = None
    split: str = "train"
    speaker: str | None = None
    max_vectors: int = 1_000_000
    nprobe: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_vectors", "nprobe"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be 0 or more")


def make_indexes(
    dataset: Path, out: Path, options: IndexOptions, console: Console
) -> list[IndexNote]:
    """Write two files for each speaker into the folder `out`; files of other speakers stay.

    Raises: UserError when faiss is not installed and when there is nothing to index.
    """
    try:
        faiss = import_faiss()
    except IndexFault as error:
        raise UserError(str(error)) from error
    fingerprint = read_dataset_info(dataset)["fingerprint"]
    units = find_units(dataset, options.encoder, options.split)
    speakers = units.speakers if options.speaker is None else [options.speaker]
    parts = [units.of(speaker) for speaker in speakers]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name the folder to write the indexes into")
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    notes = []
    steps = sum(min(part.total, options.max_vectors) for part in parts)
    with show_bar(console, "frames indexed", steps) as advance:
        for part in parts:
            index, kind = _build(faiss, part, options, advance)
            notes.append(_write(faiss, index, kind, part, out, options, fingerprint))
    with contextlib.suppress(OSError):
        (out / ".tmp").rmdir()
    return notes


def _build(
    faiss: Any, units: UnitFrames, options: IndexOptions, advance: Callable[[int], None]
) -> tuple[Any, str]:
    """The filled index of one speaker, and its factory string."""
    vectors = min(units.total, options.max_vectors)
    kind = index_kind(vectors)
    index = faiss.index_factory(units.encoder.dim, kind)
    if not index.is_trained:
        index.train(units.sample(min(vectors, _MOST_TRAINING), options.seed))
        index.nprobe = options.nprobe
    for block in units.sampled_blocks(vectors, options.seed):
        index.add(block)
        advance(len(block))
    return index, kind


def index_kind(vectors: int) -> str:
    """faiss' factory string: RVC's number of lists, and none where the search is short anyway."""
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
    options: IndexOptions,
    fingerprint: str,
) -> IndexNote:
    """The index first, then its note, which names its SHA-256: a pair that was torn apart by a
    crash is refused by `load_index`."""
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
        nprobe=options.nprobe if kind != "Flat" else None,
        seed=options.seed,
        faiss_version=faiss.__version__,
        dataset_fingerprint=fingerprint,
        sha256=digest.hexdigest(),
    )
    commit_file(out, note_path.name, lambda file: file.write(note_to_json(note).encode()))
    return note


def show_indexes(console: Console, notes: list[IndexNote], out: Path) -> None:
    for note in notes:
        drawn = f" (drawn from {note.frames})" if note.vectors < note.frames else ""
        console.print(
            f"{note.speaker}: {note.vectors} frames of {note.encoder}{drawn}, {note.kind}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"indexes in {out}", markup=False, highlight=False, soft_wrap=True)
