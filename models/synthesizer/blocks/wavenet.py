"""Non-causal WaveNet: gated convolutions, as in WaveGlow and VITS.

Source: Prenger et al., "WaveGlow: A Flow-based Generative Network for Speech Synthesis" (2018);
VITS, whose state dict this has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.weight_norm import Conv1d, SeparableConv1d


def gate(x: Tensor, condition: Tensor | None = None) -> Tensor:
    """Multiply tanh of the first half of the channels by sigmoid of the second, to (B, H, F).

    condition: added to x (B, 2H, F) first; broadcast to its shape.
    """
    if condition is not None:
        x = x + condition
    first, second = x.chunk(2, dim=1)
    return torch.tanh(first) * torch.sigmoid(second)


class WN(nn.Module):
    """Layers of gated convolutions with summed skip outputs, (B, H, F) -> (B, H, F).

    dilation_rate: layer i has the dilation dilation_rate**i.
    gin_channels: width of a speaker embedding that conditions every layer; 0 means none.
    depthwise: depthwise-separable convolutions along time.
    """

    def __init__(
        self,
        hidden_channels: int,
        kernel_size: int,
        dilation_rate: int,
        n_layers: int,
        *,
        gin_channels: int = 0,
        dropout: float = 0.0,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        conv = SeparableConv1d if depthwise else Conv1d
        self.in_layers = nn.ModuleList()
        self.res_skip_layers = nn.ModuleList()
        self.drop = nn.Dropout(dropout)
        if gin_channels:
            self.cond_layer = Conv1d(gin_channels, 2 * hidden_channels * n_layers, 1)
        for i in range(n_layers):
            dilation = dilation_rate**i
            padding = (kernel_size - 1) * dilation // 2
            self.in_layers.append(
                conv(
                    hidden_channels,
                    2 * hidden_channels,
                    kernel_size,
                    dilation=dilation,
                    padding=padding,
                )
            )
            # The last layer has only a skip output.
            parts = 2 if i < n_layers - 1 else 1
            self.res_skip_layers.append(Conv1d(hidden_channels, parts * hidden_channels, 1))

    def forward(self, x: Tensor, mask: Tensor, g: Tensor | None = None) -> Tensor:
        """Apply to x (B, H, F), 0 in padding. mask: (B, 1, F). g: (B, gin_channels, 1 or F)."""
        conditions = [None] * len(self.in_layers)
        if g is not None:
            conditions = self.cond_layer(g).chunk(len(self.in_layers), dim=1)
        total: Tensor | float = 0.0
        for layer, after, condition in zip(
            self.in_layers, self.res_skip_layers, conditions, strict=True
        ):
            y = after(self.drop(gate(layer(x), condition)))
            if after is not self.res_skip_layers[-1]:
                step, y = y.chunk(2, dim=1)
                x = (x + step) * mask
            total = total + y
        return total * mask
