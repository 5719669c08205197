"""A vector for the speaker of each clip, for millions of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint import CheckpointError
from models.encoders.encoder import DType, checked
from models.encoders.heads import Headed, XVectorHead, load_head, standardized
from models.encoders.ssl import SslEncoder


class XVector:
    """Speaker embeddings: clips (T,) in, vectors (E,) out, not normalised (cosine does that).

    A clip depends on itself alone. One too short for the time-delay layers (0.325 s in WavLM's) is
    followed by zeros up to there. Beyond 60 s the network runs in overlapping windows, as
    `SslEncoder` does; time-delay layers and statistics always see the whole clip, so a vector
    is that of the clip and no mean over pieces.
    """

    def __init__(self, model: Headed, device: str = "cpu", dtype: DType = "float32") -> None:
        """model: one with an x-vector head; it is taken over. dtype: of the network below it."""
        if not isinstance(model.head, XVectorHead):
            raise ValueError(f"a {type(model.head).__name__} gives no x-vectors")
        self.head = model.head.eval().to(device)
        self.normalize_wav = model.normalize_wav
        self.frames = SslEncoder("xvector", model.network, device, dtype)
        self.sample_rate = self.frames.sample_rate
        self.dim = self.head.dim
        config = model.network.config
        self.shortest = config.reach + (self.head.min_frames - 1) * config.hop_length  # samples

    @torch.inference_mode()
    def embed(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """(T,) float32 at `sample_rate`, on any device -> float32 CPU (E,), one for each clip.

        Raises ValueError for a clip that `checked` refuses.
        """
        clips = checked(wavs)
        if self.normalize_wav:
            clips = [standardized(wav[None], [len(wav)])[0] for wav in clips]
        clips = [F.pad(wav, (0, max(0, self.shortest - len(wav)))) for wav in clips]
        return [self._vector(frames) for frames in self.frames.encode(clips)]

    def _vector(self, frames: Tensor) -> Tensor:
        on_device = frames.to(self.frames.device)
        return self.head(on_device[None], [len(frames)])[0].cpu()


def load_xvector(
    checkpoint: str | Path,
    device: str = "cpu",
    dtype: DType = "float32",
    *,
    normalize_wav: bool | None = None,
) -> XVector:
    """The x-vectors of a folder of transformers, such as microsoft/wavlm-base-plus-sv.

    normalize_wav: None: what the folder's preprocessor_config.json says.
    Raises CheckpointError for a folder that `load_head` refuses, or with another head.
    """
    model = load_head(checkpoint, normalize_wav=normalize_wav)
    if not isinstance(model.head, XVectorHead):
        raise CheckpointError(
            f"{checkpoint} is no x-vector model: it has a {type(model.head).__name__}"
        )
    return XVector(model, device, dtype)
