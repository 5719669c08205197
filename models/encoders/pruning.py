"""Structured pruning of the network: learned gates, and conversion to a smaller dense network.

DPHuBERT's method (Peng et al., 2023): HardConcrete gates (Louizos et al., 2018) on the channels of
the convolutions, the heads, the inner features of the feed-forwards, and on whole attentions and
feed-forwards. A network with gates is trained (`models.encoders.distill`), then `prune` folds every
gate into the weights after it and removes closed parts.

Axes as in `models.encoders.wav2vec2`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.checkpoint import CheckpointError, load_foreign
from models.encoders.layouts import parse_encoder_file
from models.encoders.wav2vec2 import (
    Attention,
    FeedForward,
    LayerShape,
    StemLayer,
    TransformerLayer,
    Wav2Vec2,
)

GateKind = Literal["stem", "heads", "attention", "inner", "feed_forward"]
GATE_KINDS: tuple[GateKind, ...] = get_args(GateKind)

# Closed share at the start of training: close to none, except for the inner features.
_CLOSED_AT_START: dict[GateKind, float] = {
    "stem": 0.01,
    "heads": 0.01,
    "attention": 0.01,
    "inner": 0.5,
    "feed_forward": 0.01,
}

_KINDS: tuple[tuple[str, GateKind], ...] = (
    (r"stem\.\d+\.gate\.log_alpha", "stem"),
    (r".*\.attention\.head_gate\.log_alpha", "heads"),
    (r".*\.attention\.gate\.log_alpha", "attention"),
    (r".*\.feed_forward\.inner_gate\.log_alpha", "inner"),
    (r".*\.feed_forward\.gate\.log_alpha", "feed_forward"),
)
# Patterns of the names in DPHuBERT's code, in this order -> Cantor's names.
_PUBLISHED_GATES = (
    (r"^feature_extractor\.conv_layers\.(\d+)\.hard_concrete\.", r"stem.\1.gate."),
    (r"^encoder\.transformer\.layers\.", "layers."),
    (r"\.hard_concrete_for_heads\.", ".head_gate."),
    (r"\.hard_concrete_for_intermediate\.", ".inner_gate."),
    (r"\.hard_concrete_for_layer\.", ".gate."),
)


class HardConcrete(nn.Module):
    """Gates of `size` parts: a factor in [0, 1] for each, with learned openness (`log_alpha`).

    In training the factors are drawn from a binary concrete distribution, stretched beyond [0, 1]
    and clamped, so that exact zeros and ones occur. In evaluation they are fixed: as many are zero
    as `l0_norm` expects, the others keep their soft value.
    """

    BETA = 2 / 3  # temperature
    STRETCH = 0.1  # beyond 0 and 1

    def __init__(self, size: int, closed: float = 0.5) -> None:
        """Initialise the gates. closed: share of closed parts at the start."""
        super().__init__()
        self.log_alpha = nn.Parameter(torch.empty(size))
        nn.init.normal_(self.log_alpha, math.log(1 - closed) - math.log(closed), 0.01)

    def forward(self) -> Tensor:
        """Return the factors (size,): drawn at every call in training, `mask` in evaluation."""
        if not self.training:
            return self.mask()
        eps = 1e-6
        return self.sample(eps + (1 - 2 * eps) * torch.rand_like(self.log_alpha))

    def sample(self, uniform: Tensor) -> Tensor:
        """Convert uniform draws (size,) from (0, 1) to factors."""
        noise = uniform.log() - (1 - uniform).log()
        soft = torch.sigmoid((noise + self.log_alpha) / self.BETA)
        return (soft * (1 + 2 * self.STRETCH) - self.STRETCH).clamp(0, 1)

    def mask(self) -> Tensor:
        """Return the factors of evaluation: the round(size - l0) smallest are 0, half to even."""
        soft = torch.sigmoid(self.log_alpha / self.BETA * 0.8)
        closed = round(soft.numel() - float(self.l0_norm().detach()))
        if closed == 0:
            return soft
        smallest = soft.detach().topk(closed, largest=False).indices
        return soft.index_fill(0, smallest, 0.0)

    def l0_norm(self) -> Tensor:
        """Return the expected number of open parts, a differentiable scalar."""
        shift = self.BETA * math.log(self.STRETCH / (1 + self.STRETCH))
        return torch.sigmoid(self.log_alpha - shift).sum()


def add_gates(network: Wav2Vec2, kinds: Sequence[GateKind] = GATE_KINDS) -> None:
    """Add new gates of these kinds to `network`, in place. Absent parts get none.

    Their names in the state dict are `stem.0.gate.log_alpha`,
    `layers.0.attention.{head_gate,gate}.log_alpha`,
    `layers.0.feed_forward.{inner_gate,gate}.log_alpha`.
    """

    def new(kind: GateKind, size: int) -> HardConcrete | None:
        return HardConcrete(size, _CLOSED_AT_START[kind]) if kind in kinds else None

    for stem_layer in _stem(network):
        stem_layer.gate = new("stem", stem_layer.conv.out_channels)
    for layer in _layers(network):
        if layer.attention is not None:
            layer.attention.head_gate = new("heads", layer.attention.heads)
            layer.attention.gate = new("attention", 1)
        if layer.feed_forward is not None:
            layer.feed_forward.inner_gate = new("inner", layer.feed_forward.fc2.in_features)
            layer.feed_forward.gate = new("feed_forward", 1)
    network.to(network.projection.weight.device)


def read_gated(path: str | Path) -> Wav2Vec2:
    """Read a network with gates from a file of DPHuBERT's training, in evaluation mode.

    Raises: CheckpointError: when it is another file, or only some parts of a kind have gates.
    """
    path = Path(path)
    content = load_foreign(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    foreign = {key: t for key, t in (state or {}).items() if "hard_concrete" in key}
    if not foreign:
        raise CheckpointError(f"{path} is not a DPHuBERT with gates (hard_concrete)")
    dense = {key: t for key, t in state.items() if key not in foreign}
    config, tensors = parse_encoder_file(path, {**content, "state_dict": dense}).take()
    for key, tensor in foreign.items():
        for pattern, name in _PUBLISHED_GATES:
            key = re.sub(pattern, name, key)
        tensors[key] = tensor.float()
    network = Wav2Vec2(config)
    kinds = [kind for kind in GATE_KINDS if any(_kind_of(name) == kind for name in tensors)]
    add_gates(network, kinds)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its gates do not match its network: {error}") from error
    return network.eval()


def _kind_of(name: str) -> GateKind | None:
    for pattern, kind in _KINDS:
        if re.fullmatch(pattern, name):
            return kind
    return None


def gates(network: Wav2Vec2) -> dict[str, HardConcrete]:
    """Return all gates by name, such as "layers.0.attention.head_gate"."""
    return {n: m for n, m in network.named_modules() if isinstance(m, HardConcrete)}


def l0_norm(network: Wav2Vec2) -> Tensor:
    """Return the expected number of open parts over all gates, a scalar."""
    return torch.stack([gate.l0_norm() for gate in gates(network).values()]).sum()


def expected_parameters(network: Wav2Vec2, as_published: bool = False) -> Tensor:
    """Return the expected number of parameters of `prune(network)`, a differentiable scalar.

    For a network without gates this is its exact number of parameters. as_published: count like
    DPHuBERT's code, for comparison with its figures. That omits WavLM's position bias, its gates
    and the final projection, and always counts parts that this network may lack: the magnitudes of
    the position convolution's weight norm, the scale of the stem's output, every norm.
    """
    n_in = torch.ones((), device=network.projection.weight.device)
    count = torch.zeros_like(n_in)
    for stem_layer in _stem(network):
        n_out = _open(stem_layer.gate, stem_layer.conv.out_channels)
        count = count + n_in * n_out * stem_layer.conv.kernel_size[0]
        count = count + n_out * ((stem_layer.conv.bias is not None) + 2 * bool(stem_layer.norm))
        n_in = n_out * torch.ones_like(n_in)
    has_scale = network.stem_scale is not None or _stem(network)[-1].gate is not None
    if has_scale or as_published:
        count = count + n_in
    width = network.config.width
    count = count + 2 * n_in + (n_in + 1) * width
    count = count + sum(p.numel() for p in network.position.parameters())
    if network.norm is not None or as_published:
        count = count + 2 * width
    for layer in _layers(network):
        count = count + _expected_in_layer(layer, width, as_published)
    if as_published:
        return count + network.config.position_kernel
    for part in (network.relative_bias, network.final_projection):
        if part is not None:
            count = count + sum(p.numel() for p in part.parameters())
    return count


def _expected_in_layer(layer: TransformerLayer, width: int, as_published: bool) -> Tensor | float:
    count: Tensor | float = 0.0
    every_norm = as_published or not layer.pre_norm
    if every_norm:
        count = 4 * width
    if (attention := layer.attention) is not None:
        inner = _open(attention.head_gate, attention.heads) * attention.head_dim
        block = (width + 1) * inner * 3 + (inner + 1) * width
        if attention.bias_gate is not None and not as_published:
            block = block + sum(p.numel() for p in attention.bias_gate.parameters())
        if not every_norm:
            block = block + 2 * width
        count = count + block * _open(attention.gate, 1)
    if (feed_forward := layer.feed_forward) is not None:
        inner = _open(feed_forward.inner_gate, feed_forward.fc2.in_features)
        into = 2 * inner if feed_forward.glu else inner
        block = (width + 1) * into + (inner + 1) * width
        if not every_norm:
            block = block + 2 * width
        count = count + block * _open(feed_forward.gate, 1)
    return count


def _open(gate: nn.Module | None, size: int) -> Tensor | float:
    return gate.l0_norm() if isinstance(gate, HardConcrete) else float(size)


@torch.no_grad()
def prune(network: Wav2Vec2) -> Wav2Vec2:
    """Convert a gated network to a smaller dense one, in evaluation mode.

    Gate values are folded into the weights after them. So the result equals `network` in evaluation
    up to rounding, unless a norm loses channels that were zero before: if the last convolution is
    cut, `stem_out_norm` runs over fewer channels, and so do the norms of a stem with
    `stem_norm="layer"`. A second distillation compensates for that.

    An open block with all heads or inner features closed is a constant, its bias: it keeps one of
    them, with zero weights.

    Raises: ValueError: when a convolution would have no channels left.
    """
    network = copy.deepcopy(network).eval()  # the soft factors are multiplied into this copy
    stem, kept_channels = _prune_stem(network)
    config = dataclasses.replace(
        network.config,
        stem=stem,
        stem_scale=network.stem_scale is not None,
        layers=tuple(_prune_layer(network, i) for i in range(len(network.layers))),
    )
    if not any(shape.heads for shape in config.layers):
        config = dataclasses.replace(config, relative_bias=None)
        network.relative_bias = None
    _select_norm(network.stem_out_norm, kept_channels)
    _select_linear(network.projection, columns=kept_channels)
    for name in gates(network):
        parent, _, slot = name.rpartition(".")
        setattr(network.get_submodule(parent), slot, None)
    weight = network.projection.weight
    small = Wav2Vec2(config).to(weight.device, weight.dtype).eval()
    small.load_state_dict(network.state_dict())
    return small


def _prune_stem(network: Wav2Vec2) -> tuple[tuple[tuple[int, int, int], ...], Tensor]:
    """Prune the convolutions; return the config's `stem` and the last one's remaining channels."""
    shapes = []
    layers = _stem(network)
    kept = torch.arange(1, device=network.projection.weight.device)
    factors = torch.ones(1, device=kept.device)
    for i, (layer, (_, kernel, stride)) in enumerate(zip(layers, network.config.stem, strict=True)):
        conv = layer.conv
        weight = (conv.weight * factors[:, None])[:, kept]
        factors = _factors(layer.gate, conv.out_channels, conv.weight.device)
        kept = factors.nonzero().squeeze(1)
        if len(kept) == 0:
            raise ValueError(
                f"every channel of convolution {i} is closed: train with a lower sparsity"
            )
        conv.weight = nn.Parameter(weight[kept])
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[kept])
        if layer.norm is not None:
            _select_norm(layer.norm, kept)
        shapes.append((len(kept), kernel, stride))
    if layers[-1].gate is not None:
        scale = factors if network.stem_scale is None else network.stem_scale * factors
        network.stem_scale = nn.Parameter(scale[kept])
    return tuple(shapes), kept


def _prune_layer(network: Wav2Vec2, index: int) -> LayerShape:
    """Prune one transformer layer; return its new shape."""
    layer, shape = _layers(network)[index], network.config.layers[index]
    if layer.attention is not None:
        heads = _prune_attention(layer.attention)
        if len(heads) == 0:
            layer.attention = None
            layer.attention_norm = None if layer.pre_norm else layer.attention_norm
            shape = dataclasses.replace(shape, heads=0, kept_heads=None)
        else:
            kept = None
            if network.config.relative_bias is not None:
                before = shape.kept_heads or tuple(range(shape.heads))
                kept = tuple(before[head] for head in heads.tolist())
                kept = None if len(kept) == network.config.relative_bias.heads else kept
            shape = dataclasses.replace(shape, heads=len(heads), kept_heads=kept)
    if layer.feed_forward is not None:
        inner = _prune_feed_forward(layer.feed_forward)
        shape = dataclasses.replace(shape, feed_forward=inner)
        if inner == 0:
            layer.feed_forward = None
            layer.feed_forward_norm = None if layer.pre_norm else layer.feed_forward_norm
    return shape


def _prune_attention(attention: Attention) -> Tensor:
    """Prune closed heads; return the indices of the rest, none if the whole block is closed."""
    device = attention.out.weight.device
    whole = _factors(attention.gate, 1, device)
    factors = _factors(attention.head_gate, attention.heads, device)
    if not whole:
        return torch.zeros(0, dtype=torch.long)
    kept = _at_least_one(factors)
    size = attention.head_dim
    columns = (kept[:, None] * size + torch.arange(size, device=device)).flatten()
    total = attention.heads * size
    rows = torch.cat([columns, total + columns, 2 * total + columns])
    _select_linear(attention.qkv, rows=rows)
    attention.out.weight.mul_(factors.repeat_interleave(size)).mul_(whole)
    attention.out.bias.mul_(whole)
    _select_linear(attention.out, columns=columns)
    return kept


def _prune_feed_forward(feed_forward: FeedForward) -> int:
    """Prune closed inner features; return the number left, 0 if the whole block is closed."""
    device = feed_forward.fc2.weight.device
    whole = _factors(feed_forward.gate, 1, device)
    size = feed_forward.fc2.in_features
    factors = _factors(feed_forward.inner_gate, size, device)
    if not whole:
        return 0
    kept = _at_least_one(factors)
    _select_linear(
        feed_forward.fc1, rows=torch.cat([kept, size + kept]) if feed_forward.glu else kept
    )
    feed_forward.fc2.weight.mul_(factors).mul_(whole)
    feed_forward.fc2.bias.mul_(whole)
    _select_linear(feed_forward.fc2, columns=kept)
    return len(kept)


def _factors(gate: nn.Module | None, size: int, device: torch.device) -> Tensor:
    return gate.mask() if isinstance(gate, HardConcrete) else torch.ones(size, device=device)


def _at_least_one(factors: Tensor) -> Tensor:
    kept = factors.nonzero().squeeze(1)
    return kept if len(kept) else torch.zeros(1, dtype=torch.long, device=factors.device)


def _select_norm(norm: nn.Module, kept: Tensor) -> None:
    norm.weight = nn.Parameter(norm.weight[kept])
    norm.bias = nn.Parameter(norm.bias[kept])


def _select_linear(
    linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight[rows])
        linear.bias = nn.Parameter(linear.bias[rows])
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight[:, columns])


def _stem(network: Wav2Vec2) -> list[StemLayer]:
    return [layer for layer in network.stem if isinstance(layer, StemLayer)]


def _layers(network: Wav2Vec2) -> list[TransformerLayer]:
    return [layer for layer in network.layers if isinstance(layer, TransformerLayer)]
