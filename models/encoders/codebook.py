"""Codebooks: centres of units, the ids of nearest centres, and their files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import (
    CheckpointError,
    load_foreign,
    read_safetensors,
    save_safetensors,
)
from models.input_file import parse_json

MAX_CLUSTERS = 32767  # ids are int16
_FORMAT = "cantor-codebook"
_SCORES = 1 << 24  # largest number of scores in memory at a time, 64 MB


@dataclass(frozen=True)
class Codebook:
    """K centres for the units of one encoder.

    encoder: None where a foreign file does not state it.
    centroids: float32 (K, D), 1 <= K <= 32767, finite.
    checkpoint_sha256: of the encoder's file; None where it has no file.
    speaker: speaker whose units were used; None for all speakers of a dataset.
    settings: non-default settings of the encoder that change its units.
    """

    encoder: str | None
    checkpoint_sha256: str | None
    centroids: Tensor
    speaker: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        centroids = self.centroids
        if centroids.ndim != 2 or centroids.dtype != torch.float32:
            raise ValueError(f"centres are {tuple(centroids.shape)} {centroids.dtype}, not (K, D)")
        if not 1 <= len(centroids) <= MAX_CLUSTERS:
            raise ValueError(f"a codebook has 1 to {MAX_CLUSTERS} centres, not {len(centroids)}")
        if not torch.isfinite(centroids).all():
            raise ValueError("a centre has NaN or infinity")

    @property
    def dim(self) -> int:
        """D, the width of a frame."""
        return self.centroids.shape[1]

    def assign(self, units: Tensor) -> Tensor:
        """Return the id of the nearest centre of each frame: float (F, D) -> int16 CPU (F,).

        Raises: ValueError: when the units have another width or are not finite.
        """
        if units.ndim != 2 or units.shape[1] != self.dim:
            raise ValueError(
                f"units have shape {tuple(units.shape)}; the codebook of {self.encoder} needs "
                f"(F, {self.dim})"
            )
        return nearest(units.to(self.centroids), self.centroids).to("cpu", torch.int16)


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centre by Euclidean distance; the lowest of a tie.

    (F, D) and (K, D), float32 on one device -> int64 (F,) there. Exact, so the result does not
    depend on the device, on threads or on other frames in the call: a matrix product finds all
    centres within the bound of its rounding error, and float64 decides between them.

    Raises: ValueError: when frames are not finite.
    """
    if not torch.isfinite(frames).all():
        raise ValueError("units contain NaN or infinity")
    chunk = max(1, _SCORES // len(centroids))
    parts = [_nearest_of_few(part, centroids) for part in torch.split(frames, chunk)]
    return torch.cat(parts) if parts else frames.new_zeros(0, dtype=torch.int64)


def _nearest_of_few(frames: Tensor, centroids: Tensor) -> Tensor:
    # Shifting both does not change distances, and shorter vectors round less.
    origin = centroids.mean(0)
    x, c = frames - origin, centroids - origin
    half_squares = c.square().sum(1) / 2
    score = x @ c.T - half_squares  # (F, K): half of |x|^2 - |x - c|^2
    best, ids = score.max(1)
    # A sum of D products rounds by less than D * eps * |x| |c|; the rest by a few eps of that.
    longest = c.norm(dim=1).max()
    reach = (x.norm(dim=1) + longest) * longest
    slack = 2 * (frames.shape[1] + 8) * torch.finfo(torch.float32).eps * reach
    candidates = score >= (best - slack)[:, None]
    ambiguous = (candidates.sum(1) > 1).nonzero().squeeze(1)
    if len(ambiguous):
        ids[ambiguous] = _decide(frames[ambiguous], centroids, candidates[ambiguous])
    return ids


def _decide(frames: Tensor, centroids: Tensor, candidates: Tensor) -> Tensor:
    """Find the nearest of the centres marked in `candidates` (F, K), in float64."""
    rows, columns = candidates.nonzero(as_tuple=True)
    pairs = max(1, _SCORES // (4 * frames.shape[1]))
    squares = [
        (frames[r].double() - centroids[k].double()).square().sum(1)
        for r, k in zip(torch.split(rows, pairs), torch.split(columns, pairs), strict=True)
    ]
    distance = torch.full(candidates.shape, math.inf, dtype=torch.float64, device=frames.device)
    distance[rows, columns] = torch.cat(squares)
    return distance.argmin(1)


def save_codebooks(
    path: str | Path, codebooks: Sequence[Codebook], notes: dict[str, Any] | None = None
) -> None:
    """Write codebooks of one encoder to a safetensors file, atomically.

    One codebook for all speakers, or one per speaker. notes: further JSON values for the header,
    such as the seed. Equal content gives equal bytes.

    Raises: ValueError: when the codebooks are of several encoders or of one speaker twice.
    """
    first = codebooks[0]
    source = (first.encoder, first.dim, first.settings)
    if any((c.encoder, c.dim, c.settings) != source for c in codebooks):
        raise ValueError("all codebooks of a file must be of one encoder")
    speakers = [c.speaker for c in codebooks]
    if len(set(speakers)) != len(speakers):
        raise ValueError("two codebooks have the same speaker")
    header = {
        "encoder": first.encoder,
        "checkpoint_sha256": first.checkpoint_sha256,
        "settings": first.settings,
        "speakers": speakers,
        "notes": notes or {},
    }
    tensors = {f"centroids.{i}": c.centroids.cpu().contiguous() for i, c in enumerate(codebooks)}
    # One entry only: safetensors writes several in an order that changes between runs.
    save_safetensors(path, tensors, {_FORMAT: json.dumps(header)})


def load_codebooks(path: str | Path) -> list[Codebook]:
    """Load the codebooks of a file.

    Raises: CheckpointError: when it is not a Cantor codebook.
    """
    tensors, metadata = read_safetensors(path)
    if _FORMAT not in metadata:
        raise CheckpointError(f"{path} is not a codebook; `cantor codebook` makes one")
    try:
        header = parse_json(metadata[_FORMAT])
        return [
            Codebook(
                header["encoder"],
                header["checkpoint_sha256"],
                tensors[f"centroids.{i}"],
                speaker,
                header["settings"],
            )
            for i, speaker in enumerate(header["speakers"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged codebook: {error}") from error


def load_codebook(path: str | Path, speaker: str | None = None) -> Codebook:
    """Load the codebook of `speaker`, or the only one of a file.

    Raises: CheckpointError: when there is none, or several and no speaker is named.
    """
    codebooks = load_codebooks(path)
    if speaker is None:
        if len(codebooks) != 1:
            raise CheckpointError(
                f"{path} has codebooks of {len(codebooks)} speakers; name one of them"
            )
        return codebooks[0]
    for codebook in codebooks:
        if codebook.speaker == speaker:
            return codebook
    known = ", ".join(str(c.speaker or "all speakers") for c in codebooks[:10])
    raise CheckpointError(f"{path} has no codebook of {speaker!r}; it has that of {known}")


def load_sovits_codebooks(path: str | Path) -> list[Codebook]:
    """Load the codebooks of the speakers in a kmeans_*.pt of so-vits-svc; its encoder is unknown.

    Raises: CheckpointError: when it is another file.
    """
    content = load_foreign(path)
    if not isinstance(content, dict) or not any(map(_is_kmeans, content.values())):
        raise CheckpointError(
            f"{path} is neither a codebook of `cantor codebook` nor a kmeans_*.pt of so-vits-svc"
        )
    codebooks = []
    for speaker, kmeans in content.items():
        centres = kmeans["cluster_centers_"] if _is_kmeans(kmeans) else None
        if not isinstance(centres, Tensor):
            raise CheckpointError(f"{path} has no centres of speaker {speaker!r}")
        try:
            # Copied, because it is a view of the mapped file.
            codebook = Codebook(None, None, centres.to(torch.float32, copy=True), str(speaker))
        except ValueError as error:
            raise CheckpointError(f"{path}, speaker {speaker!r}: {error}") from error
        codebooks.append(codebook)
    return codebooks


def _is_kmeans(value: Any) -> bool:
    return isinstance(value, dict) and "cluster_centers_" in value
