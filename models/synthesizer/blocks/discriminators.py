"""Discriminators: one on the waveform, and five on the waveform folded by a period.

Source: Kong et al., "HiFi-GAN" (2020), with one scale, as in VITS. The state dict is that of
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
CHANNELS = 1024  # width of the widest layers in the papers and all released checkpoints
_SLOPE = 0.1  # negative slope of leaky ReLUs
_SCALE_LAYERS = (  # channels in and out, kernel, stride, groups
    (1, 16, 15, 1, 1),
    (16, 64, 41, 4, 4),
    (64, 256, 41, 4, 16),
    (256, 1024, 41, 4, 64),
    (1024, 1024, 41, 4, 256),
    (1024, 1024, 5, 1, 1),
)
_PERIOD_LAYERS = ((1, 32, 3), (32, 128, 3), (128, 512, 3), (512, 1024, 3), (1024, 1024, 1))

Judgement = tuple[Tensor, list[Tensor]]
"""Scores (B, N), and the features of each layer, batch first."""


class MultiPeriodDiscriminator(nn.Module):
    """All six discriminators. spectral_norm: replaces weight normalisation.

    channels: width of the widest layers; all layers are scaled by the same factor.
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
        """Return scores (B, N) of wav (B, 1, T) and layer features, for each discriminator."""
        judgements = [discriminator(wav) for discriminator in self.discriminators]
        return [scores for scores, _ in judgements], [features for _, features in judgements]


class ScaleDiscriminator(nn.Module):
    """Discriminator of the waveform."""

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

    def forward(self, wav: Tensor) -> Judgement:
        """Judge wav (B, 1, T). Features are (B, C, T'), T' decreasing from layer to layer."""
        features = _layers(self.convs, self.conv_post, wav)
        return features[-1].flatten(1), features


class PeriodDiscriminator(nn.Module):
    """Discriminator of the waveform folded into columns of every `period`-th sample."""

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

    def forward(self, wav: Tensor) -> Judgement:
        """Judge wav (B, 1, T), its end reflected to a multiple of the period.

        Features are (B, C, T', period), T' decreasing from layer to layer.
        """
        wav = F.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        columns = wav.unflatten(2, (-1, self.period)).permute(0, 3, 2, 1)  # (B, p, T / p, 1)
        features = [x.permute(0, 3, 2, 1) for x in _layers(self.convs, self.conv_post, columns)]
        return features[-1].flatten(1), features


def _layers(convs: nn.ModuleList, last: nn.Module, x: Tensor) -> list[Tensor]:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), _SLOPE, inplace=True)
        features.append(x)
    return [*features, last(x)]


class _Columns:
    """A Conv2d of width 1 as a matrix product: (B, p, T, C), each column separately.

    On a CPU the five discriminators take 0.8 to 0.9 of the time of convolutions, forward and
    backward.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        windows = _Windows.apply(x, self.kernel_size[0], self.stride[0], self.padding[0])
        return F.linear(windows, weight.flatten(1), bias)


class _Windows(torch.autograd.Function):
    """Windows (B, p, T', C * size) of `size` steps every `stride` steps of x (B, p, T, C).

    The gradient equals that of `unfold`, which is slower.
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
