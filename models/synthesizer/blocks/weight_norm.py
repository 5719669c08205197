"""Weight-normalised convolutions: a direction `weight_v` and a length `weight_g` per output.

The names and their order after the bias are those of torch's old `weight_norm`, which published
voices use.

Source: Salimans and Kingma, "Weight Normalization" (2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1d(nn.Conv1d):
    """nn.Conv1d, weight-normalised over each output channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, weight_of(self), self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d, weight-normalised over each output channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, weight_of(self), self.bias)


class ConvTranspose1d(nn.ConvTranspose1d):
    """nn.ConvTranspose1d, weight-normalised over each input channel, as in HiFi-GAN."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(
            x,
            weight_of(self),
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


class SeparableConv1d(nn.Module):
    """Depthwise-separable convolution: one per channel, then a pointwise one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        weight_norm: bool = True,
        **geometry: int,  # stride, padding, dilation
    ) -> None:
        super().__init__()
        conv = Conv1d if weight_norm else nn.Conv1d
        self.depth_conv = conv(
            in_channels, in_channels, kernel_size, groups=in_channels, bias=bias, **geometry
        )
        self.point_conv = conv(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))


class SeparableConvTranspose1d(nn.Module):
    """Depthwise-separable transposed convolution: one per channel, then a pointwise one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        weight_norm: bool = True,
        **geometry: int,  # stride, padding, output_padding, dilation
    ) -> None:
        super().__init__()
        up, point = (ConvTranspose1d, Conv1d) if weight_norm else (nn.ConvTranspose1d, nn.Conv1d)
        self.depth_conv = up(
            in_channels, in_channels, kernel_size, groups=in_channels, bias=bias, **geometry
        )
        self.point_conv = point(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))


def weight_of(conv: nn.Module) -> Tensor:
    """Return the current weight of a convolution, weight-normalised or plain."""
    if hasattr(conv, "weight_v"):
        return torch._weight_norm(conv.weight_v, conv.weight_g, 0)
    return conv.weight


_PLAIN = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, ConvTranspose1d: nn.ConvTranspose1d}


def fold_weight_norm(module: nn.Module) -> nn.Module:
    """Convert every weight-normalised convolution in the module to a plain one, in place.

    For inference: the weight is not recomputed at each call. The state dict then has `weight` in
    place of `weight_g` and `weight_v`.
    """
    for part in module.modules():
        if type(part) in _PLAIN:
            weight = nn.Parameter(weight_of(part).detach())
            del part.weight_g, part.weight_v
            part.register_parameter("weight", weight)
            part.__class__ = _PLAIN[type(part)]
    return module


def _split_weight(conv: nn.Module) -> None:
    weight = conv.weight
    del conv.weight
    length = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
    conv.weight_g = nn.Parameter(length.view(-1, *[1] * (weight.dim() - 1)))
    conv.weight_v = weight
