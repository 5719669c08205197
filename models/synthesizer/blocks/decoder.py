"""Decoders of latents to audio: HiFi-GAN, with a sine source or without.

Sources: Kong et al., "HiFi-GAN" (2020), whose generator this is; Wang et al., "Neural Source-Filter
Waveform Models" (2019) for the source. The state dicts are those of so-vits-svc (commit 730930d)
and Bert-VITS2 (61130ac).

B batch, C channels, G speaker channels, F frames, T samples = F * hop_length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.snake import Snake
from models.synthesizer.blocks.source import SineSource
from models.synthesizer.blocks.weight_norm import Conv1d, ConvTranspose1d, fold_weight_norm
from models.synthesizer.config import ModelConfig, SynthesizerConfig
from models.synthesizer.tiles import decode_in_tiles, lay_out_for_tiles

_SLOPE = 0.1  # negative slope of leaky ReLUs
_LAST_SLOPE = 0.01  # negative slope of the last one

Activation = Callable[[int], nn.Module]
"""Builds an activation for a number of channels."""

Network = TypeVar("Network", bound=nn.Module)


class SourceFilter(nn.Module):
    """NSF-HiFiGAN without a speaker; activations are leaky ReLUs or snakes (`config.decoder`).

    The activations of the upsampling stages are called snakes in either case: leaky ReLUs have no
    parameters, so the name appears in the state dict only with snakes.
    """

    def __init__(self, config: ModelConfig, source: SineSource) -> None:
        super().__init__()
        snake = config.decoder == "nsf-snake-hifigan"
        activation: Activation = Snake if snake else _leaky
        widths = _widths(config)
        self.m_source = source
        self.noise_convs = _source_convs(config)
        self.conv_pre = Conv1d(config.inter_channels, widths[0], 7, padding=3)
        self.ups = _upsamplers(config)
        self.resblocks = _resblocks(config, activation)
        self.snakes = nn.ModuleList(activation(width) for width in widths[:-1])
        self.conv_post = Conv1d(widths[-1], 1, 7, padding=3)
        self.snake_post = Snake(widths[-1]) if snake else nn.LeakyReLU(_LAST_SLOPE)

    def forward(self, z: Tensor, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """Decode to wav (B, 1, T) within (-1, 1).

        z: (B, C, F) latents, or mels. f0: (B, F) in Hz, 0 where unvoiced. phase: see SineSource.
        """
        return self._filtered(self.conv_pre(z), self.m_source(f0, noise, phase))

    @torch.no_grad()
    def infer(self, z: Tensor, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """Compute `forward` for inference: on a CPU in tiles, which saves time and memory."""
        if not _use_tiles(z):
            return self(z, f0, noise, phase)
        return self._in_tiles(self.conv_pre(z), self.m_source.infer(f0, noise, phase))

    def _in_tiles(self, x: Tensor, source: Tensor) -> Tensor:
        """Compute `_filtered` in tiles, one example after the other."""
        examples = zip(x.split(1), source.split(1), strict=True)
        return torch.cat([decode_in_tiles(self, *example) for example in examples])

    def _filtered(self, x: Tensor, source: Tensor) -> Tensor:
        """Decode the first layer's output (B, C, F) and the source (B, 1, T) to wav (B, 1, T)."""
        for i, up in enumerate(self.ups):
            x = up(self.snakes[i](x)) + self.noise_convs[i](source)
            x = _average(_stage(self.resblocks, i, len(self.ups)), x)
        return torch.tanh(self.conv_post(self.snake_post(x)))


class Generator(SourceFilter):
    """The decoder of so-vits-svc: NSF-HiFiGAN with a speaker embedding."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__(config, SineSource(config.source_rate, config.hop_length))
        self.cond = nn.Conv1d(config.gin_channels, config.upsample_initial_channel, 1)

    def forward(
        self, z: Tensor, f0: Tensor, g: Tensor, noise: Noise, phase: Tensor | None = None
    ) -> Tensor:
        """Decode to wav (B, 1, T) within (-1, 1).

        z: (B, C, F) latents. f0: (B, F) in Hz, 0 where unvoiced. g: (B, G, 1) speaker, or
        (B, G, F) where it changes. phase: see SineSource.
        """
        source = self.m_source(f0, noise, phase)
        return self._filtered(self.conv_pre(z) + self.cond(g), source)

    @torch.no_grad()
    def infer(
        self, z: Tensor, f0: Tensor, g: Tensor, noise: Noise, phase: Tensor | None = None
    ) -> Tensor:
        """Compute `forward` for inference: on a CPU in tiles, which saves time and memory."""
        if not _use_tiles(z):
            return self(z, f0, g, noise, phase)
        source = self.m_source.infer(f0, noise, phase)
        return self._in_tiles(self.conv_pre(z) + self.cond(g), source)


class PlainGenerator(nn.Module):
    """HiFi-GAN without a source, as in Bert-VITS2; its first and last layers are not normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.conv_pre = nn.Conv1d(config.inter_channels, widths[0], 7, padding=3)
        self.ups = _upsamplers(config)
        self.resblocks = _resblocks(config, _leaky)
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)
        self.cond = nn.Conv1d(config.gin_channels, widths[0], 1)

    def forward(self, z: Tensor, g: Tensor) -> Tensor:
        """Decode z (B, C, F) with the speaker g (B, G, 1 or F) to wav (B, 1, T) within (-1, 1)."""
        x = self.conv_pre(z) + self.cond(g)
        for i, up in enumerate(self.ups):
            x = up(nn.functional.leaky_relu(x, _SLOPE))
            x = _average(_stage(self.resblocks, i, len(self.ups)), x)
        return torch.tanh(self.conv_post(nn.functional.leaky_relu(x, _LAST_SLOPE)))


class ResBlock1(nn.Module):
    """Residual block: for each dilation a dilated and a plain convolution."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int] = (1, 3, 5),
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        activation = activation or _leaky
        self.convs1 = nn.ModuleList(_same(channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same(channels, kernel_size, 1) for _ in dilations)
        self.activations = nn.ModuleList(activation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) of x (B, C, T); mask: (B, 1, T), 0 where there is nothing to hear."""
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            y = dilated(_masked(self.activations[2 * i](x), mask))
            x = plain(_masked(self.activations[2 * i + 1](y), mask)).add_(x)
        return _masked(x, mask)

    def branches(self) -> list[list[tuple[nn.Module, nn.Conv1d]]]:
        """See tiles.Block."""
        pairs = zip(self.convs1, self.convs2, strict=True)
        return [
            list(zip(self.activations[2 * i : 2 * i + 2], pair, strict=True))
            for i, pair in enumerate(pairs)
        ]


class ResBlock2(nn.Module):
    """Residual block: one convolution for each dilation."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int] = (1, 3),
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        activation = activation or _leaky
        self.convs = nn.ModuleList(_same(channels, kernel_size, d) for d in dilations)
        self.activations = nn.ModuleList(activation(channels) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) of x (B, C, T); mask: (B, 1, T), 0 where there is nothing to hear."""
        for conv, activation in zip(self.convs, self.activations, strict=True):
            x = conv(_masked(activation(x), mask)).add_(x)
        return _masked(x, mask)

    def branches(self) -> list[list[tuple[nn.Module, nn.Conv1d]]]:
        """See tiles.Block."""
        return [[layer] for layer in zip(self.activations, self.convs, strict=True)]


def prepare_for_inference(network: Network) -> Network:
    """Prepare a decoder, or a network with one, for inference only, in place.

    Weight norm is folded (the state dict then has `weight`, see `fold_weight_norm`), and weights of
    decoders are stored in the memory format of the tiles. The output is the same up to rounding;
    without this, each piece prepares the weights again.
    """
    fold_weight_norm(network).requires_grad_(False).eval()
    for part in network.modules():
        if isinstance(part, SourceFilter):
            lay_out_for_tiles(part)
    return network


def _use_tiles(x: Tensor) -> bool:
    """Use tiles on CPUs only, and not in a traced graph, which cannot loop over a length."""
    return x.device.type == "cpu" and not torch.jit.is_tracing()


def _leaky(channels: int) -> nn.Module:
    return nn.LeakyReLU(_SLOPE)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _same(channels: int, kernel_size: int, dilation: int) -> Conv1d:
    """Build a convolution whose output is as long as its input."""
    padding = dilation * (kernel_size - 1) // 2
    return Conv1d(channels, channels, kernel_size, padding=padding, dilation=dilation)


def _widths(config: ModelConfig) -> list[int]:
    """Return the channels before the first upsampling and after each."""
    stages = range(len(config.upsample_rates) + 1)
    return [config.upsample_initial_channel // 2**i for i in stages]


def _upsamplers(config: ModelConfig) -> nn.ModuleList:
    widths = _widths(config)
    ups = nn.ModuleList()
    for i, rate in enumerate(config.upsample_rates):
        kernel = config.upsample_kernel_sizes[i]
        ups.append(
            ConvTranspose1d(widths[i], widths[i + 1], kernel, rate, padding=(kernel - rate) // 2)
        )
    return ups


def _source_convs(config: ModelConfig) -> nn.ModuleList:
    """Build the convolutions of the source to the rate and width of each stage."""
    convs = nn.ModuleList()
    for i, width in enumerate(_widths(config)[1:]):
        stride = math.prod(config.upsample_rates[i + 1 :])
        if stride == 1:
            convs.append(nn.Conv1d(1, width, 1))
        else:
            padding = (stride + 1) // 2
            convs.append(nn.Conv1d(1, width, 2 * stride, stride, padding=padding))
    return convs


def _resblocks(config: ModelConfig, activation: Activation) -> nn.ModuleList:
    """Build the residual blocks, stage by stage, one for each kernel size."""
    block = ResBlock1 if config.resblock == "1" else ResBlock2
    shapes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
    return nn.ModuleList(
        block(width, kernel, dilations, activation)
        for width in _widths(config)[1:]
        for kernel, dilations in shapes
    )


def _stage(blocks: nn.ModuleList, index: int, stages: int) -> Sequence[nn.Module]:
    size = len(blocks) // stages
    return [blocks[index * size + i] for i in range(size)]


def _average(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    total = blocks[0](x)
    for block in blocks[1:]:
        total += block(x)
    return total.div_(len(blocks))
