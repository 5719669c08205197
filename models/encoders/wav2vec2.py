"""The network of HuBERT, ContentVec, WavLM, HuBERT-Soft and their pruned students.

    waveform -> stem (convolutions) -> projection -> + position convolution -> transformer layers

wav2vec 2.0 (Baevski et al., 2020) with the variations of its descendants: the position of the
norms, the heads and the feed-forward width of each layer (DPHuBERT, Peng et al., 2023), and WavLM's
gated relative position bias (Chen et al., 2022). Weight norm is folded, and query, key and value
are one matrix; `models.encoders.layouts` converts every foreign checkpoint to this form.

Clips of different lengths in one padded batch give the same result as alone: GroupNorm's statistics
cover a clip's own samples, and frames beyond its end are zeroed before the position convolution and
masked in attention.

Axes: B batch, T samples, F frames, C stem channels, H hidden width, N heads.

Tested by tests/models/encoders/layouts/test_encoder_file.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEM_OF_WAV2VEC2 = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "bilinear": lambda x: x,
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Shape of one transformer layer. heads=0: no attention; feed_forward=0: no feed-forward.

    kept_heads: indices of these heads in the unpruned network; None: all of them. Used only by
    WavLM's bias, whose table has a column for every head of the unpruned network.
    """

    heads: int
    head_dim: int
    feed_forward: int
    kept_heads: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """WavLM's position bias: a table of `buckets` x `heads`, gated in every layer."""

    buckets: int = 320
    max_distance: int = 800
    heads: int


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """Shapes and order of all parts; enough to build the network of a checkpoint.

    stem: (channels, kernel, stride) of each convolution.
    stem_norm: "group" normalises the first convolution over time, "layer" every one over channels.
    pre_norm: norms come before attention and feed-forward, and one after the last layer.
    final_norm: apply that last norm (only with all layers).
    activation: of the feed-forward; "glu-swish" and similar are gated linear units.
    project_dim: width of the final projection (`final_proj`); None: none.
    pad: zeros added before and after the waveform (HuBERT-Soft: 40).
    normalize_wav: normalise each clip to mean 0 and variance 1 first.
    """

    stem: tuple[tuple[int, int, int], ...] = STEM_OF_WAV2VEC2
    stem_bias: bool = False
    stem_norm: Literal["group", "layer"] = "group"
    stem_scale: bool = False
    width: int = 768
    position_kernel: int = 128
    position_groups: int = 16
    layers: tuple[LayerShape, ...]
    pre_norm: bool = False
    final_norm: bool = False
    relative_bias: RelativeBias | None = None
    activation: str = "gelu"
    project_dim: int | None = None
    pad: int = 0
    normalize_wav: bool = False

    @property
    def dim(self) -> int:
        """Width D of the output."""
        return self.project_dim or self.width

    @property
    def hop_length(self) -> int:
        return math.prod(stride for _, _, stride in self.stem)

    @property
    def reach(self) -> int:
        """Samples that the first frame depends on, padding included: the shortest input."""
        samples = 1
        for _, kernel, stride in reversed(self.stem):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, num_samples: int) -> int:
        """Return the frames of a clip, by the convolutions' lengths, each rounded down."""
        length = num_samples + 2 * self.pad
        for _, kernel, stride in self.stem:
            length = (length - kernel) // stride + 1
        return length


class Wav2Vec2(nn.Module):
    """The network of the module docstring.

    All inputs lie on the network's device. Waveforms are float32 or of the network's dtype, other
    inputs of the network's dtype.

    masking: where set, masks the projected frames (B, F, H), given the frames of each clip, before
    the position convolution (`models.encoders.masking`).
    """

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        channels = [1, *(c for c, _, _ in config.stem)]
        self.stem = nn.ModuleList(
            StemLayer(n_in, n_out, kernel, stride, config.stem_bias, _norm_of(config, i))
            for i, (n_in, (n_out, kernel, stride)) in enumerate(
                zip(channels, config.stem, strict=False)
            )
        )
        self.stem_scale = nn.Parameter(torch.ones(channels[-1])) if config.stem_scale else None
        self.stem_out_norm = nn.LayerNorm(channels[-1])
        self.projection = nn.Linear(channels[-1], config.width)
        self.masking: nn.Module | None = None
        self.position = PositionConvolution(
            config.width, config.position_kernel, config.position_groups
        )
        has_norm = not config.pre_norm or config.final_norm
        self.norm = nn.LayerNorm(config.width) if has_norm else None
        bias = config.relative_bias
        self.relative_bias = nn.Embedding(bias.buckets, bias.heads) if bias else None
        self.layers = nn.ModuleList(TransformerLayer(config, shape) for shape in config.layers)
        self.final_projection = (
            nn.Linear(config.width, config.project_dim) if config.project_dim else None
        )

    def forward(self, wavs: Tensor, num_samples: list[int] | None = None) -> Tensor:
        """Encode (B, T) -> (B, F, D). num_samples: of each clip; the rest is padding (any values).

        Frames beyond a clip's own `config.num_frames` are undefined.
        """
        num_samples = num_samples or [wavs.shape[1]] * len(wavs)
        frames = [self.config.num_frames(n) for n in num_samples]
        return self.context(self.features(wavs, num_samples), frames)

    def features(self, wavs: Tensor, num_samples: list[int]) -> Tensor:
        """Run the stem: (B, T) -> (B, F, C)."""
        lengths = torch.tensor(num_samples, device=wavs.device)
        x = wavs
        even = len(set(num_samples)) == 1 and num_samples[0] == wavs.shape[1]
        if not even:
            x = x * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
        if self.config.normalize_wav:
            x = normalized(x, lengths)
        x = x.to(self.stem[0].conv.weight.dtype)  # last, so that quiet clips keep precision
        x = F.pad(x, (self.config.pad, self.config.pad))[:, None]  # (B, 1, T)
        lengths = lengths + 2 * self.config.pad
        for layer in self.stem:
            x, lengths = layer(x, lengths, even)
        return x.transpose(1, 2)

    def context(self, features: Tensor, num_frames: list[int]) -> Tensor:
        """Run everything after the stem: (B, F, C) -> (B, F, D)."""
        x = deque(self._states(features, num_frames), maxlen=1).pop()  # frees the others
        return x if self.final_projection is None else self.final_projection(x)

    def hidden_states(self, features: Tensor, num_frames: list[int]) -> list[Tensor]:
        """Return (B, F, H) before the first layer and after each; the last with the final norm."""
        return list(self._states(features, num_frames))

    def _states(self, features: Tensor, num_frames: list[int]) -> Iterator[Tensor]:
        x, mask, bias = self.embed(features, num_frames)
        for layer in self.layers:
            yield x
            x = layer(x, mask, bias)
        yield self.norm(x) if self.config.final_norm and self.norm is not None else x

    def embed(
        self, features: Tensor, num_frames: list[int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the layers' input: (B, F, H), mask of frames (B, F), position bias (N, F, F).

        The mask is None where every clip fills its row.
        """
        if self.stem_scale is not None:
            features = features * self.stem_scale
        x = self.projection(self.stem_out_norm(features))
        if self.masking is not None:
            x = self.masking(x, num_frames)
        n = x.shape[1]
        mask = None
        if any(frames < n for frames in num_frames):
            mask = torch.arange(n, device=x.device) < torch.tensor(
                num_frames, device=x.device
            ).unsqueeze(1)
            x = x * mask.unsqueeze(2)
        x = x + self.position(x)
        if not self.config.pre_norm and self.norm is not None:
            x = self.norm(x)
        return x, mask, self.position_bias(n)

    def position_bias(self, num_frames: int) -> Tensor | None:
        """Compute WavLM's bias before the gates: (N, F, F), a function of key minus query."""
        shape = self.config.relative_bias
        if shape is None or self.relative_bias is None:
            return None
        device = self.relative_bias.weight.device
        distance = torch.arange(1 - num_frames, num_frames, device=device)
        table = self.relative_bias(relative_buckets(distance, shape)).T  # (N, 2F - 1)
        # Row q has the distances -q .. F-1-q: windows of the table in reverse order.
        return table.unfold(1, num_frames, 1).flip(1)


def _norm_of(config: Wav2Vec2Config, index: int) -> Literal["group", "layer"] | None:
    if config.stem_norm == "layer":
        return "layer"
    return "group" if index == 0 else None


class StemLayer(nn.Module):
    """Convolution, norm, GELU. `gate`, where set, returns a factor per channel (pruning)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int,
        stride: int,
        bias: bool,
        norm: Literal["group", "layer"] | None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n_in, n_out, kernel, stride, bias=bias)
        self.norm: nn.Module | None = None
        if norm == "group":
            self.norm = GroupNorm(n_out)
        elif norm == "layer":
            self.norm = nn.LayerNorm(n_out)
        self.gate: nn.Module | None = None

    def forward(self, x: Tensor, lengths: Tensor, even: bool) -> tuple[Tensor, Tensor]:
        """Map (B, C, T) and valid lengths to those of the output. even: every row is full."""
        (kernel,), (stride,) = self.conv.kernel_size, self.conv.stride
        x = self.conv(x)
        lengths = (lengths - kernel) // stride + 1
        if isinstance(self.norm, GroupNorm):
            x = self.norm(x, None if even else lengths)
        elif self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(x)
        if self.gate is not None:
            x = x * self.gate().unsqueeze(1)
        return x, lengths


class GroupNorm(nn.Module):
    """GroupNorm with one group per channel and statistics over a clip's own samples."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Normalise (B, C, T). lengths: (B,), None where every row is full."""
        if lengths is None:
            return F.group_norm(x.float(), x.shape[1], self.weight.float(), self.bias.float()).to(x)
        wide = x.float()
        mask = (torch.arange(x.shape[2], device=x.device) < lengths[:, None]).unsqueeze(1)
        count = lengths[:, None, None]
        mean = (wide * mask).sum(2, keepdim=True) / count
        centred = (wide - mean) * mask
        variance = centred.square().sum(2, keepdim=True) / count
        wide = centred * torch.rsqrt(variance + 1e-5)
        return (wide * self.weight.float()[:, None] + self.bias.float()[:, None]).to(x)


class PositionConvolution(nn.Module):
    """Grouped convolution over frames that encodes relative position."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (B, F, H), to the same shape."""
        n = x.shape[1]
        return F.gelu(self.conv(x.transpose(1, 2))[:, :, :n]).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, both optional, each with its residual and norm.

    A post-norm layer keeps the norm of an absent block; a pre-norm layer does not have it.
    """

    def __init__(self, config: Wav2Vec2Config, shape: LayerShape) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = Attention(config, shape) if shape.heads else None
        self.feed_forward = (
            FeedForward(config.width, shape.feed_forward, config.activation)
            if shape.feed_forward
            else None
        )
        keeps = not config.pre_norm
        norms = [nn.LayerNorm(config.width) for _ in range(2)]
        self.attention_norm = norms[0] if keeps or shape.heads else None
        self.feed_forward_norm = norms[1] if keeps or shape.feed_forward else None

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Apply to x (B, F, H); mask (B, F) and bias (N, F, F) come from `Wav2Vec2.embed`."""
        if self.pre_norm:
            if self.attention is not None:
                x = x + self.attention(self.attention_norm(x), mask, bias)
            if self.feed_forward is not None:
                x = x + self.feed_forward(self.feed_forward_norm(x))
            return x
        if self.attention is not None:
            x = x + self.attention(x, mask, bias)
        x = self.attention_norm(x)
        if self.feed_forward is not None:
            x = x + self.feed_forward(x)
        return self.feed_forward_norm(x)


class Attention(nn.Module):
    """Multi-head self-attention, with WavLM's gated position bias where the network has one.

    head_gate, gate: where set, factors for each head and for the whole block (pruning).
    attend: softmax(q k / sqrt(head_dim) + mask) v, replaceable by a faster kernel.
    """

    def __init__(self, config: Wav2Vec2Config, shape: LayerShape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.heads, shape.head_dim
        self.qkv = nn.Linear(config.width, 3 * shape.heads * shape.head_dim)
        self.out = nn.Linear(shape.heads * shape.head_dim, config.width)
        self.bias_gate = (
            BiasGate(config.relative_bias.heads, shape.kept_heads, config.width)
            if config.relative_bias
            else None
        )
        self.head_gate: nn.Module | None = None
        self.gate: nn.Module | None = None
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        n_clips, n_frames, _ = x.shape
        qkv = self.qkv(x).view(n_clips, n_frames, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, N, F, head_dim)
        attn_mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, F)
        if self.bias_gate is not None and bias is not None:
            gated = self.bias_gate(x, bias)  # (B, N, F, F)
            attn_mask = gated if attn_mask is None else gated.masked_fill(~attn_mask, -torch.inf)
        attended = self.attend(q, k, v, attn_mask=attn_mask)
        if self.head_gate is not None:
            attended = attended * self.head_gate()[:, None, None]
        x = self.out(attended.transpose(1, 2).flatten(2))
        return x if self.gate is None else x * self.gate()


class BiasGate(nn.Module):
    """Gates of the position bias for each query: WavLM, equations 3 to 6.

    They depend on the attention's input split by heads, not on the projected query.
    """

    def __init__(self, heads: int, kept_heads: tuple[int, ...] | None, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.kept = list(kept_heads) if kept_heads is not None else None
        self.linear = nn.Linear(width // heads, 8)
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Gate the bias: (B, F, H), (N of the unpruned network, F, F) -> (B, N, F, F)."""
        x = x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, F, H / N)
        scale = self.scale[:, None, None]
        if self.kept is not None:
            x, bias, scale = x[:, self.kept], bias[self.kept], scale[self.kept]
        update, reset = self.linear(x).unflatten(3, (2, 4)).sum(4).sigmoid().split(1, dim=3)
        return (update * (reset * scale - 1) + 2) * bias


class FeedForward(nn.Module):
    """Two linear layers with an activation or a gated linear unit between them.

    inner_gate, gate: where set, factors for each inner feature and for the whole block (pruning).
    """

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        glu, _, gate = activation.partition("-")
        self.glu = _GATES[gate] if glu == "glu" else None
        self.activation = None if self.glu else _ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, 2 * inner if self.glu else inner)
        self.fc2 = nn.Linear(inner, width)
        self.inner_gate: nn.Module | None = None
        self.gate: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.glu is not None:
            value, gate = x.chunk(2, dim=2)
            x = value * self.glu(gate)
        elif self.activation is not None:
            x = self.activation(x)
        if self.inner_gate is not None:
            x = x * self.inner_gate()
        x = self.fc2(x)
        return x if self.gate is None else x * self.gate()


def normalized(wavs: Tensor, lengths: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each clip (B, T) to mean 0 and variance 1 over its own samples; padding stays 0."""
    mask = torch.arange(wavs.shape[1], device=wavs.device) < lengths[:, None]
    wide = wavs.float()
    mean = (wide * mask).sum(1, keepdim=True) / lengths[:, None]
    centred = (wide - mean) * mask
    variance = centred.square().sum(1, keepdim=True) / lengths[:, None]
    return (centred * torch.rsqrt(variance + eps)).to(wavs)


def relative_buckets(distance: Tensor, shape: RelativeBias) -> Tensor:
    """Return the bucket of each distance (key minus query).

    Half of the buckets are for keys ahead; near distances have one bucket each, far ones share
    logarithmic buckets. As in T5 (Raffel et al., 2020), with the logarithm in float32.
    """
    per_side = shape.buckets // 2
    single = per_side // 2
    ahead = (distance > 0).long() * per_side
    distance = distance.abs()
    far = torch.log(distance.clamp(min=1).float() / single) / math.log(shape.max_distance / single)
    far = (single + (far * (per_side - single)).long()).clamp(max=per_side - 1)
    return ahead + torch.where(distance < single, distance, far)
