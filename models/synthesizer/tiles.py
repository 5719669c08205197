"""Decoding in tiles of time, equal to decoding the whole signal up to rounding.

A tile of each upsampling stage fits into a core's cache, and memory is needed for tiles only. A
tile is read with a halo of as many samples as the convolutions reach, and each convolution drops
the part of the halo that it used. At the ends of the signal it pads, as for the whole signal.

Tensors are (1, C, 1, T) in the memory format `channels_last`, which makes convolutions of few
channels up to twice as fast. C channels, T samples at the rate of a stage, R the upsampling factor
of a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.synthesizer.blocks.snake import Snake
from models.synthesizer.blocks.weight_norm import weight_of

_VALUES = 1 << 18  # values of a tile: 1 MB, so that intermediate results stay in a core's cache
_REACHES = 64  # shortest tile in multiples of its reach; 2 or more


class TileableBlock(Protocol):
    """A residual block that can be computed in tiles."""

    def branches(self) -> list[list[tuple[nn.Module, nn.Conv1d]]]:
        """Return the residual branches in order, as layers (activation, convolution)."""
        ...


class TileableDecoder(Protocol):
    """A HiFi-GAN with a source; every stage has the same number of residual blocks."""

    ups: nn.ModuleList
    snakes: nn.ModuleList  # activations before the upsamplers
    noise_convs: nn.ModuleList
    resblocks: nn.ModuleList
    snake_post: nn.Module
    conv_post: nn.Conv1d


def decode_in_tiles(decoder: TileableDecoder, x: Tensor, source: Tensor) -> Tensor:
    """Decode the first stage's input x (1, C, F) and the source (1, 1, T) to wav (1, 1, T)."""
    chunks: Iterable[Tensor] = [x.unsqueeze(2).contiguous(memory_format=torch.channels_last)]
    blocks = len(decoder.resblocks) // len(decoder.ups)
    for i, up in enumerate(decoder.ups):
        stage = _Stage(
            _Activation(decoder.snakes[i]),
            _Upsampler(up),
            _SourceConv(decoder.noise_convs[i]),
            [_Block(block) for block in decoder.resblocks[i * blocks : (i + 1) * blocks]],
        )
        chunks = stage(chunks, source)
    return torch.cat(list(_last_layer(decoder, chunks)), dim=-1).squeeze(2)


def lay_out_for_tiles(decoder: TileableDecoder) -> None:
    """Store weights in the memory format of the tiles, in place, to avoid a copy at each call.

    Shapes and values stay the same. Weight norm must be folded before.
    """
    for conv in [*decoder.ups, *decoder.resblocks.modules(), decoder.conv_post]:
        if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
            conv.weight.data = _flat_weight(conv).squeeze(2)


def _last_layer(decoder: TileableDecoder, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    activation, conv = _Activation(decoder.snake_post), _Conv(decoder.conv_post)
    halo = activation.reach + conv.reach
    for window in _windows(chunks, _size(conv.channels, halo), halo):
        yield torch.tanh(conv(activation(window.x, window.ends), window.ends))


# ---- windows -----------------------------------------------------------------------------------


class _Ends(NamedTuple):
    """Flags of a tile that begins or ends at an end of the signal; other ends are cuts."""

    first: bool
    last: bool


class _Window(NamedTuple):
    """A tile with its halo at each end that is a cut."""

    x: Tensor
    begin: int  # position of x in the signal
    ends: _Ends


def _windows(chunks: Iterable[Tensor], size: int, halo: int) -> Iterator[_Window]:
    """Yield tiles of `size` samples, the last one of `halo` to `size + halo`; `size` > `halo`.

    chunks: the signal, in chunks of any length.
    """
    rest: Tensor | None = None
    begin, before = 0, 0  # before: samples of `rest` that lie before the next tile
    for chunk in chunks:
        rest = chunk if rest is None else torch.cat([rest, chunk], dim=-1)
        while rest.shape[-1] > before + size + halo:
            x = rest[..., : before + size + halo]
            yield _Window(x, begin, _Ends(begin == 0, False))
            step = before + size - halo
            rest, begin, before = rest[..., step:], begin + step, halo
    assert rest is not None
    yield _Window(rest, begin, _Ends(begin == 0, True))


def _inner(x: Tensor, reach: int, ends: _Ends) -> Tensor:
    """Drop `reach` samples of x at each end that is a cut."""
    return x[..., 0 if ends.first else reach : x.shape[-1] - (0 if ends.last else reach)]


# ---- layers ------------------------------------------------------------------------------------
# `reach`: input samples on each side that an output sample depends on. The output is shorter by
# that many at each end that is a cut.


class _Activation:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.reach = module.reach if isinstance(module, Snake) else 0

    def __call__(self, x: Tensor, ends: _Ends, overwrite: bool = False) -> Tensor:
        if isinstance(self.module, nn.LeakyReLU):
            return F.leaky_relu(x, self.module.negative_slope, inplace=overwrite)
        return _inner(self.module(x.squeeze(2)).unsqueeze(2), self.reach, ends)


class _Conv:
    """A convolution that pads so that its output is as long as its input."""

    def __init__(self, conv: nn.Conv1d) -> None:
        self.weight, self.bias = _flat_weight(conv), conv.bias
        self.channels, self.dilation = conv.in_channels, conv.dilation[0]
        self.reach = int(conv.padding[0])

    def __call__(self, x: Tensor, ends: _Ends) -> Tensor:
        if any(ends):
            x = F.pad(x, [self.reach * end for end in ends])
        return F.conv2d(x, self.weight, self.bias, dilation=(1, self.dilation))


class _Upsampler:
    """Upsampling (1, C, 1, T) to (1, C', 1, R T); invalid within `reach` input samples of a cut."""

    def __init__(self, up: nn.ConvTranspose1d) -> None:
        self.weight, self.bias = _flat_weight(up), up.bias
        self.channels, self.rate, self.padding = up.out_channels, up.stride[0], int(up.padding[0])
        self.reach = (up.kernel_size[0] - 1 - self.padding) // self.rate

    def __call__(self, x: Tensor) -> Tensor:
        stride, padding = (1, self.rate), (0, self.padding)
        return F.conv_transpose2d(x, self.weight, self.bias, stride, padding)


class _SourceConv:
    """A convolution of the source to the rate and width of a stage."""

    def __init__(self, conv: nn.Conv1d) -> None:
        self.weight, self.bias = conv.weight.squeeze(1), conv.bias  # (C, taps)
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def __call__(self, source: Tensor, begin: int, count: int) -> Tensor:
        """Return (1, C, 1, count) from output sample `begin` on; source is (1, 1, T)."""
        first = begin * self.stride - self.padding
        last = first + (count - 1) * self.stride + self.weight.shape[1]
        inside = source[..., max(0, first) : last]
        padded = F.pad(inside, (max(0, -first), max(0, last - source.shape[-1])))
        taps = padded.squeeze(1).unfold(-1, self.weight.shape[1], self.stride)
        return F.linear(taps, self.weight, self.bias).transpose(1, 2).unsqueeze(2)


class _Branch:
    def __init__(self, layers: list[tuple[nn.Module, nn.Conv1d]]) -> None:
        self.layers = [(_Activation(activation), _Conv(conv)) for activation, conv in layers]
        self.reach = sum(activation.reach + conv.reach for activation, conv in self.layers)

    def __call__(self, x: Tensor, ends: _Ends) -> Tensor:
        y = x
        for activation, conv in self.layers:
            y = conv(activation(y, ends, overwrite=y is not x), ends)
        return y.add_(_inner(x, self.reach, ends))


class _Block:
    def __init__(self, block: TileableBlock) -> None:
        self.branches = [_Branch(layers) for layers in block.branches()]
        self.reach = sum(branch.reach for branch in self.branches)

    def __call__(self, x: Tensor, ends: _Ends) -> Tensor:
        for branch in self.branches:
            x = branch(x, ends)
        return x


class _Stage:
    """One stage of the decoder: upsample, add the source, average the residual blocks."""

    def __init__(
        self,
        activation: _Activation,
        up: _Upsampler,
        source_conv: _SourceConv,
        blocks: Sequence[_Block],
    ) -> None:
        self.activation, self.up = activation, up
        self.source_conv, self.blocks = source_conv, blocks
        self.reach = max(block.reach for block in blocks)  # output samples
        self.halo = activation.reach + up.reach + -(-self.reach // up.rate)  # input samples
        self.size = max(2 * self.halo, _size(up.channels, self.reach) // up.rate)

    def __call__(self, chunks: Iterable[Tensor], source: Tensor) -> Iterator[Tensor]:
        """Yield the output in chunks, from the input in chunks and the whole source (1, 1, T)."""
        for x, begin, ends in _windows(chunks, self.size, self.halo):
            spare = self.halo * self.up.rate - self.reach
            y = self.up(self.activation(x, ends))
            y = _inner(y, spare - self.activation.reach * self.up.rate, ends)
            begin = begin * self.up.rate + (0 if ends.first else spare)
            y += self.source_conv(source, begin, y.shape[-1])
            yield self._average(y, ends)

    def _average(self, x: Tensor, ends: _Ends) -> Tensor:
        total = self.blocks[0](_inner(x, self.reach - self.blocks[0].reach, ends), ends)
        for block in self.blocks[1:]:
            total += block(_inner(x, self.reach - block.reach, ends), ends)
        return total.div_(len(self.blocks))


def _size(channels: int, reach: int) -> int:
    """Return the samples of a tile: few enough for the cache, many compared to the reach."""
    return max(_VALUES // channels, _REACHES * reach)


def _flat_weight(conv: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    """Return the weight (C', C, 1, taps) in the memory format of the tiles."""
    weight = weight_of(conv).detach().unsqueeze(2)
    return weight.contiguous(memory_format=torch.channels_last)
