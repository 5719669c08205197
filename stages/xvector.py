"""Speaker embeddings: one x-vector per clip from a speaker-verification network.

Tested by tests/pipeline/tools/test_speaker_purity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from stages.resample import ResampleConfig
from stages.types import Array
from stages.units import groups_of_wavs

if TYPE_CHECKING:  # torch is slow to import, and settings are read without it
    from models.encoders.xvector import XVector


@dataclass(frozen=True, kw_only=True)
class XvectorConfig:
    """Settings of the speaker embedding of clips.

    checkpoint: file or folder of weights; None turns the embedding off.
    device: "auto" is CUDA where available.
    """

    checkpoint: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


def embed_clips(
    clips: Sequence[Array], sample_rate: int, model: XVector, resample_cfg: ResampleConfig
) -> list[NDArray[np.float32]]:
    """Return the embedding of each clip, float32 (E,). clips: (T,) each, at `sample_rate`."""
    embeddings: list[NDArray[np.float32]] = []
    for wavs in groups_of_wavs(clips, sample_rate, model.sample_rate, resample_cfg):
        embeddings += [embedding.numpy() for embedding in model.embed(wavs)]
    return embeddings
