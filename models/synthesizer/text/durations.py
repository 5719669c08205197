"""Durations of symbols: a predictor, a stochastic predictor (flow), and a discriminator.

Sources: Kim et al., "Conditional Variational Autoencoder with Adversarial Learning for End-to-End
Text-to-Speech" (2021), appendix B; Kong et al., "VITS2" (2023), section 2.1. The state dicts are
those of Bert-VITS2 (commit 61130ac).

B batch, H hidden channels, G speaker channels, N symbols, K bins of a spline. Masks are (B, 1, N),
1 in symbols and 0 in padding.

A flow's forward returns (y, log |det dy/dx| (B,)), and with `reverse=True` x only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.synthesizer.blocks.attention import LayerNorm
from models.synthesizer.blocks.flows import Flip
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.text.splines import tailed_spline

_FLOWS = 4
_LOG_TWO_PI = math.log(2 * math.pi)


class DDSConv(nn.Module):
    """Dilated depthwise-separable convolutions with residuals; dilation kernel_size**layer."""

    def __init__(
        self, channels: int, kernel_size: int, n_layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        dilations = [kernel_size**layer for layer in range(n_layers)]
        self.drop = nn.Dropout(dropout)
        self.convs_sep = nn.ModuleList(
            nn.Conv1d(
                channels,
                channels,
                kernel_size,
                groups=channels,
                dilation=dilation,
                padding=(kernel_size - 1) * dilation // 2,
            )
            for dilation in dilations
        )
        self.convs_1x1 = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.norms_1 = nn.ModuleList(LayerNorm(channels) for _ in dilations)
        self.norms_2 = nn.ModuleList(LayerNorm(channels) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor, g: Tensor | None = None) -> Tensor:
        """Apply to x (B, H, N); g, of the same shape, is added to x."""
        if g is not None:
            x = x + g
        layers = zip(self.convs_sep, self.norms_1, self.convs_1x1, self.norms_2, strict=True)
        for depthwise, norm_1, pointwise, norm_2 in layers:
            y = F.gelu(norm_1(depthwise(x * mask)))
            y = F.gelu(norm_2(pointwise(y)))
            x = x + self.drop(y)
        return x * mask


class ConvReluNorm(nn.Module):
    """Convolutions, each followed by norm and ReLU, with one residual around them all."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int,
        n_layers: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * (n_layers - 1)]
        self.conv_layers = nn.ModuleList(
            nn.Conv1d(channels, hidden_channels, kernel_size, padding=kernel_size // 2)
            for channels in widths
        )
        self.norm_layers = nn.ModuleList(LayerNorm(hidden_channels) for _ in widths)
        self.drop = nn.Dropout(dropout)
        self.proj = _zeroed(nn.Conv1d(hidden_channels, out_channels, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, in_channels, N) to (B, out_channels, N); the two are equal, or one is 1."""
        y = x
        for conv, norm in zip(self.conv_layers, self.norm_layers, strict=True):
            y = self.drop(F.relu(norm(conv(y * mask))))
        return (x + self.proj(y)) * mask


class Log(nn.Module):
    """The logarithm as a flow; values below 1e-5 count as 1e-5."""

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        if reverse:
            return torch.exp(x) * mask
        y = torch.log(x.clamp(min=1e-5)) * mask
        return y, -y.sum((1, 2))


class ElementwiseAffine(nn.Module):
    """A flow with a shift and a positive scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(channels, 1))
        self.logs = nn.Parameter(torch.zeros(channels, 1))

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        if reverse:
            return (x - self.m) * torch.exp(-self.logs) * mask
        y = (self.m + torch.exp(self.logs) * x) * mask
        return y, (self.logs * mask).sum((1, 2))


class ConvFlow(nn.Module):
    """A coupling flow: a spline for half of the channels, shaped by the other half."""

    def __init__(
        self,
        in_channels: int,
        filter_channels: int,
        kernel_size: int,
        n_layers: int,
        bins: int = 10,
        bound: float = 5.0,
    ) -> None:
        super().__init__()
        self.bins, self.bound, self.scale = bins, bound, math.sqrt(filter_channels)
        half = in_channels // 2
        self.pre = nn.Conv1d(half, filter_channels, 1)
        self.convs = DDSConv(filter_channels, kernel_size, n_layers)
        self.proj = _zeroed(nn.Conv1d(filter_channels, half * (3 * bins - 1), 1))

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Map x (B, C, N). g: (B, filter_channels, N), added to the convolutions' input."""
        kept, moved = x.chunk(2, dim=1)
        shape = self.proj(self.convs(self.pre(kept), mask, g)) * mask
        shape = shape.unflatten(1, (moved.shape[1], -1)).transpose(2, 3)  # (B, half, N, 3 K - 1)
        widths, heights, slopes = shape.split([self.bins, self.bins, self.bins - 1], dim=-1)
        moved, log_slope = tailed_spline(
            moved,
            widths / self.scale,
            heights / self.scale,
            slopes,
            bound=self.bound,
            inverse=reverse,
        )
        y = torch.cat([kept, moved], dim=1) * mask
        return y if reverse else (y, (log_slope * mask).sum((1, 2)))


class StochasticDurationPredictor(nn.Module):
    """A distribution of durations, as a flow over (log duration, auxiliary variable).

    It is trained with variational dequantisation and data augmentation: the posterior flow models
    the fraction that a whole number of frames leaves open. No gradient flows to the hidden states
    or to the speaker.
    """

    def __init__(
        self, channels: int, kernel_size: int, dropout: float, gin_channels: int = 0
    ) -> None:
        super().__init__()
        self.log_flow = Log()
        self.flows = _flows(channels, kernel_size)
        self.post_pre = nn.Conv1d(1, channels, 1)
        self.post_proj = nn.Conv1d(channels, channels, 1)
        self.post_convs = DDSConv(channels, kernel_size, n_layers=3, dropout=dropout)
        self.post_flows = _flows(channels, kernel_size)
        self.pre = nn.Conv1d(channels, channels, 1)
        self.proj = nn.Conv1d(channels, channels, 1)
        self.convs = DDSConv(channels, kernel_size, n_layers=3, dropout=dropout)
        if gin_channels:
            self.cond = nn.Conv1d(gin_channels, channels, 1)

    def forward(
        self, x: Tensor, mask: Tensor, durations: Tensor, g: Tensor | None, noise: Noise
    ) -> Tensor:
        """Bound the negative log likelihood (B,) of durations (B, 1, N) in frames from above."""
        x = self._condition(x, mask, g)
        condition = self.post_proj(self.post_convs(self.post_pre(durations), mask)) * mask
        e_q = noise.normal(durations.expand(-1, 2, -1))
        z_q, log_det = _run(self.post_flows, e_q, mask, x + condition)
        logit, augmented = z_q.chunk(2, dim=1)
        log_det = log_det + ((F.logsigmoid(logit) + F.logsigmoid(-logit)) * mask).sum((1, 2))
        log_q = _log_normal(e_q, mask) - log_det

        rest = (durations - torch.sigmoid(logit) * mask) * mask  # durations without the fraction
        log_rest, log_det_log = self.log_flow(rest, mask)
        z, log_det = _run(self.flows, torch.cat([log_rest, augmented], dim=1), mask, x)
        return log_q - _log_normal(z, mask) - log_det - log_det_log

    def sample(
        self,
        x: Tensor,
        mask: Tensor,
        g: Tensor | None,
        noise: Noise,
        noise_scale: float = 1.0,
    ) -> Tensor:
        """Draw log durations (B, 1, N) in frames."""
        x = self._condition(x, mask, g)
        z = noise.normal(x[:, :1].expand(-1, 2, -1)) * noise_scale
        affine, _, *others = self.flows  # the first spline changes only the half that is dropped
        for flow in (*reversed(others), affine):
            z = flow(z, mask, g=x, reverse=True)
        return z[:, :1]

    def _condition(self, x: Tensor, mask: Tensor, g: Tensor | None) -> Tensor:
        x = self.pre(x.detach())
        if g is not None:
            x = x + self.cond(g.detach())
        return self.proj(self.convs(x, mask)) * mask


class DurationPredictor(nn.Module):
    """Predictor of the log duration. No gradient flows to the hidden states or to the speaker."""

    def __init__(
        self,
        in_channels: int,
        filter_channels: int,
        kernel_size: int,
        dropout: float,
        gin_channels: int = 0,
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        padding = kernel_size // 2
        self.conv_1 = nn.Conv1d(in_channels, filter_channels, kernel_size, padding=padding)
        self.norm_1 = LayerNorm(filter_channels)
        self.conv_2 = nn.Conv1d(filter_channels, filter_channels, kernel_size, padding=padding)
        self.norm_2 = LayerNorm(filter_channels)
        self.proj = nn.Conv1d(filter_channels, 1, 1)
        if gin_channels:
            self.cond = nn.Conv1d(gin_channels, in_channels, 1)

    def forward(self, x: Tensor, mask: Tensor, g: Tensor | None = None) -> Tensor:
        """Predict log durations (B, 1, N) in frames from x (B, H, N)."""
        x = x.detach()
        if g is not None:
            x = x + self.cond(g.detach())
        x = self.drop(self.norm_1(F.relu(self.conv_1(x * mask))))
        x = self.drop(self.norm_2(F.relu(self.conv_2(x * mask))))
        return self.proj(x * mask) * mask


class DurationDiscriminator(nn.Module):
    """Discriminator of aligned and predicted log durations, without gradients to hidden states."""

    def __init__(
        self,
        in_channels: int,
        filter_channels: int,
        kernel_size: int,
        dropout: float,
        gin_channels: int = 0,
    ) -> None:
        super().__init__()

        def conv(channels: int) -> nn.Conv1d:
            return nn.Conv1d(channels, filter_channels, kernel_size, padding=kernel_size // 2)

        self.drop = nn.Dropout(dropout)
        self.conv_1 = conv(in_channels)
        self.norm_1 = LayerNorm(filter_channels)
        self.conv_2 = conv(filter_channels)
        self.norm_2 = LayerNorm(filter_channels)
        self.dur_proj = nn.Conv1d(1, filter_channels, 1)
        self.pre_out_conv_1 = conv(2 * filter_channels)
        self.pre_out_norm_1 = LayerNorm(filter_channels)
        self.pre_out_conv_2 = conv(filter_channels)
        self.pre_out_norm_2 = LayerNorm(filter_channels)
        if gin_channels:
            self.cond = nn.Conv1d(gin_channels, in_channels, 1)
        self.output_layer = nn.Sequential(nn.Linear(filter_channels, 1), nn.Sigmoid())

    def forward(
        self, x: Tensor, mask: Tensor, durations: Iterable[Tensor], g: Tensor | None = None
    ) -> list[Tensor]:
        """Return scores (B, N, 1), 0 to 1, for each tensor (B, 1, N) of log durations."""
        x = x.detach()
        if g is not None:
            x = x + self.cond(g.detach())
        x = self.drop(self.norm_1(F.relu(self.conv_1(x * mask))))
        x = self.drop(self.norm_2(F.relu(self.conv_2(x * mask))))
        return [self._probability(x, mask, each) for each in durations]

    def _probability(self, x: Tensor, mask: Tensor, durations: Tensor) -> Tensor:
        x = torch.cat([x, self.dur_proj(durations)], dim=1)
        x = self.drop(self.pre_out_norm_1(F.relu(self.pre_out_conv_1(x * mask))))
        x = self.drop(self.pre_out_norm_2(F.relu(self.pre_out_conv_2(x * mask))))
        return self.output_layer((x * mask).transpose(1, 2))


def duration_loss(
    nll: Tensor,
    predicted: Tensor,
    aligned: Tensor,
    mask: Tensor,
    total_symbols: float | None = None,
) -> Tensor:
    """Loss of both predictors per symbol: negative log likelihood, and squared error.

    nll: (B,) from StochasticDurationPredictor. predicted, aligned: (B, 1, N) log durations, 0 in
    padding. total_symbols: of the global batch, without padding; None: of `mask`.
    """
    total = nll.sum() + (predicted - aligned).square().sum()
    return total / (mask.sum() if total_symbols is None else total_symbols)


def _flows(channels: int, kernel_size: int) -> nn.ModuleList:
    flows: list[nn.Module] = [ElementwiseAffine(2)]
    for _ in range(_FLOWS):
        flows += [ConvFlow(2, channels, kernel_size, n_layers=3), Flip()]
    return nn.ModuleList(flows)


def _run(flows: Iterable[nn.Module], x: Tensor, mask: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Apply all flows in order; return (y, log |det dy/dx| (B,))."""
    total = x.new_zeros(len(x))
    for flow in flows:
        x, log_det = flow(x, mask, g=g)
        total = total + log_det
    return x, total


def _log_normal(z: Tensor, mask: Tensor) -> Tensor:
    """Return the log density (B,) of z under the standard normal distribution."""
    return (-0.5 * (_LOG_TWO_PI + z.square()) * mask).sum((1, 2))


def _zeroed(conv: nn.Conv1d) -> nn.Conv1d:
    """Initialise a convolution to zero, so that the layer initially adds nothing."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
