"""The critics of training: one listens to the wav as it is, five to every p-th sample of it.

Source: Kong et al., "HiFi-GAN" (2020), with one scale, as VITS has it. The state dict is that of
so-vits-svc (commit 730930d) and Bert-VITS2.

B batch, C channels, T samples, N scores, p period.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.synthesizer.blocks import weight_norm

PERIODS = (2, 3, 5, 7, 11)
CHANNELS = 1024  # of the widest layers, in the papers and in every released checkpoint
_SLOPE = 0.1  # of leaky ReLUs
_SCALE_LAYERS = (  # channels in and out, kernel, stride, groups
    (1, 16, 15, 1, 1),
    (16, 64, 41, 4, 4),
    (64, 256, 41, 4, 16),
    (256, 1024, 41, 4, 64),
    (1024, 1024, 41, 4, 256),
    (1024, 1024, 5, 1, 1),
)
_PERIOD_LAYERS = ((1, 32, 3), (32, 128, 3), (128, 512, 3), (512, 1024, 3), (1024, 1024, 1))

Verdict = tuple[Tensor, list[Tensor]]
"""Scores (B, N), and the features of each layer, batch first."""


class MultiPeriodDiscriminator(nn.Module):
    """All six of them. spectral_norm: in place of weight normalisation.

    channels: of the widest layers; all layers are narrower by the same factor.
    """

    def __init__(self, spectral_norm: bool = False, channels: int = CHANNELS) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            [
                ScaleDiscriminator(spectral_norm, channels),
                *(PeriodDiscriminator(period, spectral_norm, channels) for period in PERIODS),
            ]
        )

    def forward(self, wav: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Of each one its scores (B, N) of wav (B, 1, T), and the features of its layers."""
        verdicts = [discriminator(wav) for discriminator in self.discriminators]
        return [scores for scores, _ in verdicts], [features for _, features in verdicts]


class ScaleDiscriminator(nn.Module):
    def __init__(self, spectral_norm: bool = False, channels: int = CHANNELS) -> None:
        super().__init__()
        conv = _spectral(nn.Conv1d) if spectral_norm else weight_norm.Conv1d
        less = CHANNELS // channels
        self.convs = nn.ModuleList(
            conv(
                max(1, into // less),
                out // less,
                kernel,
                stride,
                padding=kernel // 2,
                groups=max(1, groups // less),
            )
            for into, out, kernel, stride, groups in _SCALE_LAYERS
        )
        self.conv_post = conv(channels, 1, 3, padding=1)

    def forward(self, wav: Tensor) -> Verdict:
        """wav: (B, 1, T). Features are (B, C, shorter and shorter)."""
        features = _layers(self.convs, self.conv_post, wav)
        return features[-1].flatten(1), features


class PeriodDiscriminator(nn.Module):
    def __init__(self, period: int, spectral_norm: bool = False, channels: int = CHANNELS) -> None:
        super().__init__()
        self.period = period
        conv = _spectral(_ColumnConv) if spectral_norm else _NormedColumnConv
        less = CHANNELS // channels
        self.convs = nn.ModuleList(
            conv(max(1, into // less), out // less, (5, 1), (stride, 1), padding=(2, 0))
            for into, out, stride in _PERIOD_LAYERS
        )
        self.conv_post = conv(channels, 1, (3, 1), padding=(1, 0))

    def forward(self, wav: Tensor) -> Verdict:
        """wav: (B, 1, T), its end mirrored to a multiple of the period.

        Features are (B, C, shorter and shorter, period).
        """
        wav = F.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        columns = wav.unflatten(2, (-1, self.period)).permute(0, 3, 2, 1)  # (B, p, T / p, 1)
        found = _layers(self.convs, self.conv_post, columns)
        features = [x.permute(0, 3, 2, 1) for x in found]
        return features[-1].flatten(1), features


def _layers(convs: nn.ModuleList, last: nn.Module, x: Tensor) -> list[Tensor]:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), _SLOPE, inplace=True)
        features.append(x)
    return [*features, last(x)]


class _Columns:
    """A Conv2d of width 1 as a product of matrices: (B, p, T, C), each column for itself.

    On a CPU, the five of them so take 0.8 to 0.9 of the time of convolutions, there and back.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        windows = _Windows.apply(x, self.kernel_size[0], self.stride[0], self.padding[0])
        return F.linear(windows, weight.flatten(1), bias)


class _Windows(torch.autograd.Function):
    """(B, p, T', C * size): each `stride` steps, `size` of them, of x (B, p, T, C).

    The gradient is that of `unfold`, which takes longer to add it up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int, around: int) -> Tensor:
        ctx.steps = x.shape[2]
        ctx.size, ctx.stride, ctx.around = size, stride, around
        padded = F.pad(x, (0, 0, around, around))
        return padded.unfold(2, size, stride).flatten(3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradient.unflatten(3, (-1, ctx.size))  # (B, p, T', C, size)
        batch, period, windows, channels, size = gradient.shape
        padded = gradient.new_zeros(batch, period, ctx.steps + 2 * ctx.around, channels)
        span = (windows - 1) * ctx.stride + 1
        for i in range(size):
            padded[:, :, i : i + span : ctx.stride] += gradient[..., i]
        return padded[:, :, ctx.around : ctx.around + ctx.steps], None, None, None


class _ColumnConv(_Columns, nn.Conv2d):
    pass


class _NormedColumnConv(_Columns, weight_norm.Conv2d):
    pass


def _spectral(conv: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda *args, **kwargs: nn.utils.spectral_norm(conv(*args, **kwargs))
