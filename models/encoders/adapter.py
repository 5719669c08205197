"""The adapter: strided convolutions that reduce the frame rate of a fine-tuned network.

As in wav2vec 2.0 in front of a text decoder (Li et al., 2021). Implemented here because in
transformers the padding of a batch leaks into a clip's last frames; parameter names are the same as
there.

Tested by tests/models/encoders/test_fine_tuning.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """An optional projection to another width, then convolutions with gated linear units.

    layer_drop: share of the convolutions skipped in training; a skipped one keeps the number of
    frames. rng: decides, one number per convolution and call.
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
        """Build the adapter. width: of the input frames. dim: of the output frames."""
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.layer_drop, self.rng = layer_drop, rng
        self.proj = nn.Linear(width, dim) if width != dim else None
        self.proj_layer_norm = nn.LayerNorm(dim) if width != dim else None
        self.layers = nn.ModuleList(AdapterLayer(dim, kernel, stride) for _ in range(num_layers))

    def num_frames(self, num_frames: int) -> int:
        """Return the output frames in evaluation for a number of input frames."""
        for _ in self.layers:
            num_frames = self._after_one(num_frames)
        return num_frames

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Apply to (B, F, width) and frames of each clip: (B, F', dim), frames of each clip."""
        if self.proj is not None and self.proj_layer_norm is not None:
            x = self.proj_layer_norm(self.proj(x))
        frames = list(num_frames)
        x = x.transpose(1, 2)
        for layer in self.layers:
            draw = self.rng.random_sample() if self.training else 1.0
            if draw > self.layer_drop:
                x = layer(_without_padding(x, frames))
                frames = [self._after_one(n) for n in frames]
        return x.transpose(1, 2), frames

    def _after_one(self, num_frames: int) -> int:
        return (num_frames + 2 - self.kernel) // self.stride + 1


class AdapterLayer(nn.Module):
    """A convolution with a gated linear unit over its channels."""

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, 2 * dim, kernel, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (B, dim, F): (B, dim, F')."""
        return F.glu(self.conv(x), dim=1)


def _without_padding(x: Tensor, num_frames: list[int]) -> Tensor:
    """Zero x (B, dim, F) beyond each clip's own frames, as convolutions pad a single clip."""
    n = x.shape[2]
    if all(frames == n for frames in num_frames):
        return x
    own = torch.arange(n, device=x.device) < torch.tensor(num_frames, device=x.device)[:, None]
    return x * own.unsqueeze(1)
