"""Dropout that costs little on a CPU, where torch draws a number for every element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CHANCES = 1 << 16  # a draw of 64 bits serves four elements


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with other random numbers, in half of the time.

    There p counts in steps of 2**-16, and the scale is that of the step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.draws(x):
            return super().forward(x)
        dropped = min(round(self.p * _CHANCES), _CHANCES - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        chances = bits.view(torch.int16)[: x.numel()].view(x.shape)
        kept = chances >= dropped - _CHANCES // 2
        return x * kept.to(x.dtype).mul_(_CHANCES / (_CHANCES - dropped))

    def draws(self, x: Tensor) -> bool:
        """Whether x would lose something here, and on a CPU."""
        return self.training and 0 < self.p < 1 and x.device.type == "cpu"
