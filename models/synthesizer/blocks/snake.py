"""The snake activation, computed at twice the rate to avoid aliasing.

Sources: Ziyin et al., "Neural Networks Fail to Learn Periodic Functions and How to Fix It" (2020);
Lee et al., "BigVGAN" (2023).

B batch, C channels, T samples.

Tested by tests/models/synthesizer/blocks/test_decoder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TAPS = 12  # length of both low-pass filters
_REACH = _TAPS // 2 - 1  # samples of the lower rate that the filters read beyond either end
_KAISER_BETA = 4.663800127934911  # 51 dB by Kaiser's formula: a transition of 0.6 of the band


class Snake(nn.Module):
    """x + sin^2(a x) / b at twice the rate, (B, C, T) to (B, C, T), with a and b per channel."""

    reach = _REACH  # input samples on each side that an output sample depends on

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.act = _Sine(channels)
        self.upsample = _Filter()
        self.downsample = _Down()

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self.act(self._up(x)))

    def _up(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T) to (B, C, 2T)."""
        surplus = 3 * _REACH  # samples that the padding adds to either end
        x = F.pad(x, (_REACH, _REACH), mode="replicate")
        taps = 2 * self.upsample.filter.expand(self.channels, -1, -1)
        x = F.conv_transpose1d(x, taps, stride=2, groups=self.channels)
        return x[..., surplus:-surplus]

    def _down(self, x: Tensor) -> Tensor:
        """Downsample (B, C, 2T) to (B, C, T)."""
        x = F.pad(x, (_REACH, _REACH + 1), mode="replicate")
        taps = self.downsample.lowpass.filter.expand(self.channels, -1, -1)
        return F.conv1d(x, taps, stride=2, groups=self.channels)


class _Sine(nn.Module):
    """Snake without resampling; alpha and beta are the logarithms of a and b."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compute with sin^2 y = (1 - cos 2y) / 2, a third faster, mostly in the gradients."""
        a, b = self.alpha.exp().unsqueeze(1), self.beta.exp().unsqueeze(1)  # (C, 1)
        half = 0.5 / (b + 1e-9)
        return torch.addcmul(x + half, torch.cos(x * (2 * a)), -half)


class _Filter(nn.Module):
    """Container of a half-band low-pass filter, under the name that checkpoints use."""

    filter: Tensor  # (1, 1, taps)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", _lowpass().view(1, 1, -1))


class _Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lowpass = _Filter()


def _lowpass() -> Tensor:
    """Return a Kaiser-windowed sinc with the sum 1."""
    window = torch.kaiser_window(_TAPS, periodic=False, beta=_KAISER_BETA)
    time = torch.arange(_TAPS) - (_TAPS - 1) / 2
    taps = window * torch.sinc(time / 2)
    return taps / taps.sum()
