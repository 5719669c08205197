"""Speaker embedding from a reference spectrogram, in place of a table of speakers.

Source: Skerry-Ryan et al., "Towards End-to-End Prosody Transfer for Expressive Speech Synthesis
with Tacotron" (2018), section 3.2; as in Bert-VITS2 (commit 61130ac).
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.synthesizer.blocks.weight_norm import Conv2d

_FILTERS = (32, 32, 64, 64, 128, 128)
_STATE = 128


class ReferenceEncoder(nn.Module):
    """Strided convolutions over time and frequency, then the last state of a GRU.

    Frames after the end of a clip are not masked, as in Bert-VITS2.
    """

    def __init__(self, spec_channels: int, gin_channels: int) -> None:
        super().__init__()
        channels = (1, *_FILTERS)
        self.convs = nn.ModuleList(
            Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1)
            for c_in, c_out in pairwise(channels)
        )
        bands = spec_channels
        for _ in self.convs:
            bands = (bands + 1) // 2
        self.gru = nn.GRU(_FILTERS[-1] * bands, _STATE, batch_first=True)
        self.proj = nn.Linear(_STATE, gin_channels)

    def forward(self, spec: Tensor) -> Tensor:
        """Encode a linear spectrogram (B, K, F) to (B, G)."""
        x = spec.transpose(1, 2).unsqueeze(1)  # (B, 1, F, K)
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x.transpose(1, 2).flatten(2)  # (B, F / 64, 128 * bands)
        _, state = self.gru(x)
        return self.proj(state.squeeze(0))
