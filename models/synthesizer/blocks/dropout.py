"""Faster dropout on CPUs, where torch draws one random number per element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 1 << 16  # one draw of 64 bits serves four elements


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU it uses other random numbers and takes half the time.

    On a CPU p is rounded to steps of 2**-16, and the scale follows the rounded p.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.draws(x):
            return super().forward(x)
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = bits.view(torch.int16)[: x.numel()].view(x.shape)
        kept = levels >= dropped - _LEVELS // 2
        return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))

    def draws(self, x: Tensor) -> bool:
        """Check whether this class draws the dropout of x itself: in training and on a CPU."""
        return self.training and 0 < self.p < 1 and x.device.type == "cpu"
