"""Speaker embeddings (x-vectors) of clips.

Tested by tests/models/encoders/test_heads.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint import CheckpointError
from models.encoders.encoder import DType, check_clips
from models.encoders.heads import HeadedNetwork, XVectorHead, load_head, standardized
from models.encoders.ssl import SslEncoder


class XVector:
    """Embedding of clips (T,) as vectors (E,), not normalised (cosine similarity is).

    The vector of a clip depends on that clip only. A clip too short for the time-delay layers
    (0.325 s in WavLM's) is padded with zeros. Beyond 60 s the network runs in overlapping windows,
    as in `SslEncoder`; time-delay layers and statistics always cover the whole clip, so a vector is
    not a mean over pieces.
    """

    def __init__(self, model: HeadedNetwork, device: str = "cpu", dtype: DType = "float32") -> None:
        """Take over a model with an x-vector head. dtype: precision of the network below it."""
        if not isinstance(model.head, XVectorHead):
            raise ValueError(f"the model has a {type(model.head).__name__}, not an x-vector head")
        self.head = model.head.eval().to(device)
        self.normalize_wav = model.normalize_wav
        self.frames = SslEncoder("xvector", model.network, device, dtype)
        self.sample_rate = self.frames.sample_rate
        self.dim = self.head.dim
        config = model.network.config
        self.shortest = config.reach + (self.head.min_frames - 1) * config.hop_length  # samples

    @torch.inference_mode()
    def embed(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Embed clips: (T,) float32 at `sample_rate`, on any device -> float32 CPU (E,) each.

        Raises: ValueError: when `check_clips` refuses a clip.
        """
        clips = check_clips(wavs)
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
    """Load an x-vector model from a transformers folder, such as microsoft/wavlm-base-plus-sv.

    normalize_wav: None: as in the folder's preprocessor_config.json.

    Raises: CheckpointError: when `load_head` refuses the folder or it has another head.
    """
    model = load_head(checkpoint, normalize_wav=normalize_wav)
    if not isinstance(model.head, XVectorHead):
        raise CheckpointError(
            f"{checkpoint} is not an x-vector model: it has a {type(model.head).__name__}"
        )
    return XVector(model, device, dtype)
