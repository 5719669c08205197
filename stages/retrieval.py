"""Feature retrieval: units are mixed with the nearest frames of a speaker from a faiss index.

An index is two files: `NAME.index` of faiss, which contains the frames themselves, and `NAME.json`,
which describes them.
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

from models.input_file import read_json, require_regular
from models.synthesizer.json_fields import typed

Frames = NDArray[np.float32]

_LONGEST_NAME = 200  # file names end at 255 bytes on most file systems


class IndexFault(ValueError):
    """A missing or unusable index; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class IndexNote:
    """Description of an index: `vectors` frames of width `dim`, of `speaker`, by `encoder`.

    frames: number that the speaker has; more than `vectors` when the index was limited. kind:
    faiss' factory string. nprobe: lists that a search reads; None for an index without lists.
    sha256: hash of the .index file.
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
    """A searchable index of the frames of one speaker."""

    note: IndexNote
    index: Any  # faiss.Index

    def search(self, units: Frames, k: int = 8) -> tuple[Frames, Frames]:
        """Search the `k` nearest frames of each unit (F, D).

        Returns squared distances (F, k), nearest first, and the frames (F, k, D). Missing
        neighbours have infinite distance and zero frames.

        Raises: ValueError: when the units have another width or are not finite.
        """
        if units.ndim != 2 or units.shape[1] != self.note.dim:
            raise ValueError(
                f"units have shape {units.shape}; the index of {self.note.encoder} needs "
                f"(F, {self.note.dim})"
            )
        if not np.isfinite(units).all():
            raise ValueError("units contain NaN or infinity")
        queries = np.ascontiguousarray(units, np.float32)
        squares, places, frames = self.index.search_and_reconstruct(queries, k)
        missing = places < 0
        squares = np.maximum(squares, 0)  # rounding
        squares[missing] = np.inf
        frames[missing] = 0
        return squares, frames

    def blend(self, units: Frames, k: int = 8) -> Frames:
        """Replace each unit by the weighted mean of its `k` nearest frames: (F, D) -> (F, D).

        The weight is 1 / (squared distance)^2, as in RVC and so-vits-svc. A frame equal to the unit
        counts alone; a unit without any neighbour is unchanged.
        """
        squares, frames = self.search(units, k)
        nearest = squares[:, :1]  # scaling by it keeps the weights finite
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = np.where(squares == nearest, 1.0, (nearest / squares) ** 2)
        weights[~np.isfinite(squares)] = 0
        total = weights.sum(1, keepdims=True)
        matched = total[:, 0] > 0
        blended = units.astype(np.float32)
        share = weights[matched] / total[matched]
        blended[matched] = np.einsum("fk,fkd->fd", share, frames[matched])
        return blended


def index_files(folder: Path, speaker: str) -> tuple[Path, Path]:
    """Return the paths of the .index and the .json of a speaker; the name may be any text."""
    name = quote(speaker, safe=" ")
    if name.startswith("."):  # hidden, or a folder
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        name = f"{name[:100]}-{hashlib.sha256(speaker.encode()).hexdigest()[:16]}"
    return folder / f"{name}.index", folder / f"{name}.json"


def note_to_json(note: IndexNote) -> str:
    return json.dumps(asdict(note), indent=2, ensure_ascii=False) + "\n"


def load_index(folder: str | Path, speaker: str) -> SpeakerIndex:
    """Load the index of `speaker` in `folder`.

    The caller compares the note's encoder and checkpoint with its own.

    Raises: IndexFault: when there is none or its two files do not belong together.
    """
    faiss = import_faiss()
    index_path, note_path = index_files(Path(folder), speaker)
    try:
        note: IndexNote = typed(IndexNote, read_json(note_path), "")
        require_regular(index_path)
        with index_path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise IndexFault(
            f"{folder} has no index of speaker '{speaker}' ({error.filename} does not exist)"
        ) from error
    except (ValueError, TypeError) as error:
        raise IndexFault(f"{note_path} does not describe an index: {error}") from error
    if sha256 != note.sha256:  # faiss may crash on a damaged file
        raise IndexFault(f"{index_path} is not the file that {note_path.name} describes")
    try:
        index = faiss.read_index(str(index_path))
    except RuntimeError as error:
        raise IndexFault(f"{index_path} is not an index that faiss can read") from error
    if (index.d, index.ntotal) != (note.dim, note.vectors):
        raise IndexFault(
            f"{index_path} has {index.ntotal} vectors of width {index.d}, but {note_path.name} "
            f"describes {note.vectors} of width {note.dim}"
        )
    return SpeakerIndex(note, index)


def import_faiss() -> Any:
    """Import faiss, an optional dependency.

    Raises: IndexFault: when it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise IndexFault(
            "retrieval needs faiss, which is not installed: pip install 'cantor[retrieval]'"
        ) from error
    return faiss
