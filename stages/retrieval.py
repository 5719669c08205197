"""Feature retrieval: units drawn towards those of a speaker, through an index of their frames.

An index is two files: `NAME.index` of faiss, which holds the frames themselves, and `NAME.json`,
which says what they are frames of.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.float32]

_LONGEST_NAME = 200  # file names end at 255 bytes on most file systems


class IndexFault(ValueError):
    """What is wrong with an index, in a sentence for a person."""


@dataclass(frozen=True, kw_only=True)
class IndexNote:
    """What an index holds: `vectors` frames of width `dim`, of `speaker`, by `encoder`.

    frames: that the speaker had; more than `vectors` when the index was limited. kind: faiss'
    factory string. nprobe: lists that a search looks into; None where there are no lists.
    sha256: of the .index file.
    """

    encoder: str
    checkpoint_sha256: str | None
    dim: int
    speaker: str
    vectors: int
    frames: int
    kind: str
    nprobe: int | None
    seed: int
    faiss_version: str
    dataset_fingerprint: str
    sha256: str


@dataclass(frozen=True)
class SpeakerIndex:
    """The frames of a speaker, to be searched."""

    note: IndexNote
    index: Any  # faiss.Index

    def search(self, units: Frames, k: int = 8) -> tuple[Frames, Frames]:
        """The `k` nearest frames of each unit: (F, D) -> squared distances (F, k), nearest first,
        and the frames (F, k, D). Where the index has or finds fewer: infinity, and zeros.

        Raises ValueError for another width and for units that are not finite.
        """
        if units.ndim != 2 or units.shape[1] != self.note.dim:
            raise ValueError(
                f"units are {units.shape}; the index of {self.note.encoder} takes "
                f"(F, {self.note.dim})"
            )
        if not np.isfinite(units).all():
            raise ValueError("units are NaN or infinite")
        queries = np.ascontiguousarray(units, np.float32)
        squares, places, frames = self.index.search_and_reconstruct(queries, k)
        missing = places < 0
        squares = np.maximum(squares, 0)  # rounding
        squares[missing] = np.inf
        frames[missing] = 0
        return squares, frames

    def blend(self, units: Frames, k: int = 8) -> Frames:
        """The mean of the `k` nearest frames of each unit, weighted by 1 / squared distance^2, as
        RVC and so-vits-svc weight them: (F, D) -> (F, D). A frame that is equal counts alone; a
        unit for which nothing is found stays."""
        squares, frames = self.search(units, k)
        nearest = squares[:, :1]  # scaling by it keeps the weights finite
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = np.where(squares == nearest, 1.0, (nearest / squares) ** 2)
        weights[~np.isfinite(squares)] = 0
        total = weights.sum(1, keepdims=True)
        found = total[:, 0] > 0
        blended = units.astype(np.float32)
        share = weights[found] / total[found]
        blended[found] = np.einsum("fk,fkd->fd", share, frames[found])
        return blended


def index_files(folder: Path, speaker: str) -> tuple[Path, Path]:
    """The .index and the .json of a speaker, whose name may hold anything."""
    name = quote(speaker, safe=" ")
    if name.startswith("."):  # hidden, or a folder
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        name = f"{name[:100]}-{hashlib.sha256(speaker.encode()).hexdigest()[:16]}"
    return folder / f"{name}.index", folder / f"{name}.json"


def note_to_json(note: IndexNote) -> str:
    return json.dumps(asdict(note), indent=2, ensure_ascii=False) + "\n"


def load_index(folder: str | Path, speaker: str) -> SpeakerIndex:
    """The index of `speaker` in `folder`. The caller compares its note's encoder and checkpoint
    with those that it uses.

    Raises IndexFault when there is none, and when its two files are not of one making.
    """
    faiss = import_faiss()
    index_path, note_path = index_files(Path(folder), speaker)
    try:
        note = IndexNote(**json.loads(note_path.read_text("utf-8")))
        with index_path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise IndexFault(
            f"{folder} has no index of speaker '{speaker}' ({error.filename} is not there)"
        ) from error
    except (ValueError, TypeError) as error:
        raise IndexFault(f"{note_path} is not the note of an index: {error}") from error
    if sha256 != note.sha256:  # faiss may crash on a damaged file
        raise IndexFault(f"{index_path} is not the file that {note_path.name} is about")
    return SpeakerIndex(note, faiss.read_index(str(index_path)))


def import_faiss() -> Any:
    """faiss, which is optional. Raises IndexFault that says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise IndexFault(
            "retrieval needs faiss, which is not installed: pip install 'cantor[retrieval]'"
        ) from error
    return faiss
