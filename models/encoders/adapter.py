"""The adapter: a few strided convolutions that thin out the frames of a fine-tuned network.

As wav2vec 2.0 has it in front of a text decoder (Li et al., 2021). Ours rather than transformers',
whose padded batches let a clip's padding into its last frames; parameters have the names they have
there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """Projection to another width where there is one, then convolutions with gated linear units.

    layer_drop: share of the convolutions that training leaves out; each left out leaves the frames
    as many as they were. rng: decides it, one number for every convolution and call.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        num_layers: int = 3,
        kernel: int = 3,
        stride: int = 2,
        layer_drop: float = 0.0,
        rng: np.random.RandomState,
    ) -> None:
        """width: of the frames that come in. dim: of those that come out."""
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.layer_drop, self.rng = layer_drop, rng
        self.proj = nn.Linear(width, dim) if width != dim else None
        self.proj_layer_norm = nn.LayerNorm(dim) if width != dim else None
        self.layers = nn.ModuleList(AdapterLayer(dim, kernel, stride) for _ in range(num_layers))

    def num_frames(self, num_frames: int) -> int:
        """Frames that come out in evaluation, for those that come in."""
        for _ in self.layers:
            num_frames = self._after_one(num_frames)
        return num_frames

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> tuple[Tensor, list[int]]:
        """(B, F, width), frames of each clip -> (B, F', dim), frames of each clip."""
        if self.proj is not None and self.proj_layer_norm is not None:
            x = self.proj_layer_norm(self.proj(x))
        frames = list(num_frames)
        x = x.transpose(1, 2)
        for layer in self.layers:
            drawn = self.rng.random_sample() if self.training else 1.0
            if drawn > self.layer_drop:
                x = layer(_without_padding(x, frames))
                frames = [self._after_one(n) for n in frames]
        return x.transpose(1, 2), frames

    def _after_one(self, num_frames: int) -> int:
        return (num_frames + 2 - self.kernel) // self.stride + 1


class AdapterLayer(nn.Module):
    """A convolution, and a gated linear unit over its channels."""

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, 2 * dim, kernel, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, F) -> (B, dim, F')"""
        return F.glu(self.conv(x), dim=1)


def _without_padding(x: Tensor, num_frames: list[int]) -> Tensor:
    """(B, dim, F), zero beyond each clip's own frames, which is how a lone clip is padded."""
    n = x.shape[2]
    if all(frames == n for frames in num_frames):
        return x
    own = torch.arange(n, device=x.device) < torch.tensor(num_frames, device=x.device)[:, None]
    return x * own.unsqueeze(1)
