"""Fast inference of the network: packed matrix products, and a stem in tiles.

Two things make inference on a CPU faster. Matrix products and attention run in oneDNN's kernels
(`models.cpu_packing`), with GELU fused in. The stem's activations, 6.5 MB per second of audio,
exceed the cache: the stem runs in tiles that fit, each convolution as one matrix product.

Tiles also bound the memory for a song of any length, on every device. They are exact: GroupNorm's
statistics over the whole clip are computed from the moments of the waveform before the first tile.

`int8=True` (`models.encoders.int8`) is optional and not exact. These parts stay in float32, because
errors grow from them or they take little time: the projections, the position convolution, attention
and its output, and all of the stem but its second layer, which is half of it.

Tested by tests/models/test_cpu_packing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cpu_packing import PackedLinear, can_pack
from models.encoders.int8 import Int8Linear
from models.encoders.wav2vec2 import (
    GroupNorm,
    PositionConvolution,
    StemLayer,
    Wav2Vec2,
    Wav2Vec2Config,
    normalized,
)

_TILE_FRAMES = {"cpu": 64, "cuda": 3000}
_BLOCK_ROWS = 1 << 18


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Compute `F.scaled_dot_product_attention` head by head with oneDNN's matrix products.

    q, k, v: (B, N, F, head_dim); attn_mask: added to the logits, broadcast to (B, N, F, F).
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    n_clips, n_heads, n_frames, head_dim = q.shape
    q = q * head_dim**-0.5
    attended = q.new_empty(n_clips, n_frames, n_heads, v.shape[3]).transpose(1, 2)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(n_clips, n_heads, n_frames, n_frames)
    for clip in range(n_clips):
        for head in range(n_heads):
            at = (clip, head)
            logits = _linear(q[at], k[at].contiguous())
            if attn_mask is not None:
                logits += attn_mask[at]
            attended[at] = _linear(logits.softmax(1), v[at].T.contiguous())
    return attended


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack(network: Wav2Vec2, int8: bool = False) -> Wav2Vec2:
    """Replace the network's matrix products by packed ones, in place, where possible.

    int8: use integer products in the transformer layers, except attention's output.
    """
    for layer in network.layers:
        inner, attention = layer.feed_forward, layer.attention
        if inner is not None and can_pack(inner.fc1.weight):
            gelu = inner.activation is F.gelu
            kind = Int8Linear if int8 else PackedLinear
            inner.fc1 = kind(inner.fc1.weight, inner.fc1.bias, gelu)
            inner.fc2 = kind(inner.fc2.weight, inner.fc2.bias)
            if gelu:
                inner.activation = None
        if attention is not None and can_pack(attention.qkv.weight):
            attention.attend = attend
            if int8:
                attention.qkv = Int8Linear(attention.qkv.weight, attention.qkv.bias)
    if can_pack(network.position.conv.weight):
        network.position = PackedPosition(network.position)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
    return network


class PackedPosition(nn.Module):
    """The position convolution as one matrix product for each group of channels."""

    def __init__(self, position: PositionConvolution) -> None:
        super().__init__()
        conv = position.conv
        (self.kernel,), self.groups = conv.kernel_size, conv.groups
        weights = conv.weight.transpose(1, 2).flatten(1).chunk(self.groups)
        biases = conv.bias.chunk(self.groups)
        self.products = nn.ModuleList(
            PackedLinear(weight, bias, gelu=True)
            for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (B, F, H), to the same shape."""
        n_clips, n_frames, _ = x.shape
        x = F.pad(x, (0, 0, self.kernel // 2, self.kernel - self.kernel // 2))
        groups = []
        for group, product in zip(x.chunk(self.groups, dim=2), self.products, strict=True):
            rows, _, width = (group := group.contiguous()).shape
            shape = (rows, n_frames, self.kernel * width)
            windows = group.as_strided(shape, (group.stride(0), width, 1))  # rows overlap
            groups.append(product(windows.contiguous()))
        return torch.cat(groups, dim=2).view(n_clips, n_frames, -1)


class TiledStem:
    """The stem of a network over one clip of any length, in tiles of frames."""

    def __init__(self, network: Wav2Vec2, int8: bool = False) -> None:
        """Prepare the layers. int8: run the second one, half of the arithmetic, in integers."""
        self.config: Wav2Vec2Config = network.config
        self.layers = [TileLayer(layer, int8 and i == 1) for i, layer in enumerate(network.stem)]
        weight = network.stem[0].conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.frames = _TILE_FRAMES.get(self.device.type, 256)

    def __call__(self, wav: Tensor) -> Tensor:
        """Apply to (T,) float32, at least one frame long: (F, C)."""
        wav = wav.to(self.device)
        if self.config.normalize_wav:
            wav = normalized(wav[None], torch.tensor([len(wav)], device=wav.device))[0]
        n_frames = self.config.num_frames(len(wav))
        wav = F.pad(wav, (self.config.pad, self.config.pad))
        first = self.layers[0].adapted(wav)
        wav = wav.to(self.dtype)
        hop, reach = self.config.hop_length, self.config.reach
        out = wav.new_empty(n_frames, self.config.stem[-1][0])
        for start in range(0, n_frames, self.frames):
            stop = min(start + self.frames, n_frames)
            x = first(wav[start * hop : (stop - 1) * hop + reach, None])
            for layer in self.layers[1:]:
                x = layer(x)
            out[start:stop] = x
        return out


class TileLayer:
    """One convolution of the stem as a matrix product over (T, C), with its norm and GELU."""

    def __init__(self, layer: StemLayer, int8: bool = False) -> None:
        (self.kernel,), (self.stride,) = layer.conv.kernel_size, layer.conv.stride
        weight = layer.conv.weight.detach().transpose(1, 2).flatten(1)  # (C out, kernel * C)
        bias = None if layer.conv.bias is None else layer.conv.bias.detach()
        self.norm = layer.norm
        if isinstance(self.norm, GroupNorm):
            self.weight = weight  # for `adapted`, which builds the product
            return
        gelu = self.norm is None
        self.product = Int8Linear(weight, bias, gelu) if int8 else _product(weight, bias, gelu)

    def adapted(self, wav: Tensor) -> TileLayer:
        """Return this layer (the first) with GroupNorm's statistics over all of `wav` folded in.

        The mean and variance over time of a convolution's output follow from the mean and
        covariance of its input windows.
        """
        if not isinstance(self.norm, GroupNorm):
            return self
        windows = wav.unfold(0, self.kernel, self.stride)  # (T out, kernel)
        blocks = windows.split(_BLOCK_ROWS)
        mean = sum(block.double().sum(0) for block in blocks) / len(windows)
        centred = (block - mean for block in blocks)
        covariance = sum(block.T @ block for block in centred) / len(windows)
        weight = self.weight.double()
        variance = ((weight @ covariance) * weight).sum(1)
        scale = self.norm.weight.double() * torch.rsqrt(variance + 1e-5)
        shift = self.norm.bias.double() - scale * (weight @ mean)  # a bias of the conv cancels
        layer = object.__new__(TileLayer)
        layer.kernel, layer.stride, layer.norm = self.kernel, self.stride, None
        layer.product = _product(
            (weight * scale[:, None]).to(self.weight), shift.to(self.weight), gelu=True
        )
        return layer

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to (T, C in): (T out, C out)."""
        channels = x.shape[1]
        n_out = (len(x) - self.kernel) // self.stride + 1
        x = x.contiguous().as_strided(
            (n_out, self.kernel * channels), (self.stride * channels, 1)
        )  # rows overlap
        x = self.product(x)
        return x if self.norm is None else F.gelu(self.norm(x))


def _product(weight: Tensor, bias: Tensor | None, gelu: bool) -> nn.Module:
    if can_pack(weight):
        return PackedLinear(weight, bias, gelu)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return nn.Sequential(linear, nn.GELU()) if gelu else linear
