"""Reading of RMVPE's weights, such as the community's `rmvpe.pt`, with a check of keys and shapes.

A file is `{"model": state dict}` or a bare state dict, in torch's containers or safetensors. Every
key must be present, known and of its shape.

Tested by tests/models/f0/test_rmvpe.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.checkpoint import CheckpointError, load_weights
from models.f0.bins import NUM_BINS
from models.f0.mel import NUM_MELS

LEVELS = 5  # each halves frames and mel bins
MAPS = 3  # feature maps of the U-Net's output, NUM_MELS values per frame each
_FILTER = "unet.tf."


@dataclass(frozen=True)
class RmvpeConfig:
    """Widths and depths of the network; the defaults are those of the published one.

    channels: of the first level; each level doubles them. blocks: residual blocks in each layer.
    inter_layers: layers between encoder and decoder. hidden: width of the GRU in each direction.
    timbre_filter: the file has the weights of `unet.tf`, which the published network never uses.
    """

    channels: int = 16
    blocks: int = 4
    inter_layers: int = 4
    hidden: int = 256
    timbre_filter: bool = True

    @property
    def widths(self) -> list[int]:
        """Channels of each level, and of the layers between encoder and decoder."""
        return [self.channels << level for level in range(LEVELS + 1)]

    @property
    def reach(self) -> int:
        """Frames on either side that a frame of the U-Net depends on; a multiple of 2 ** LEVELS."""
        block = 2  # two convolutions, each reaching one step at its own level
        layers = 2 * sum(block * self.blocks << level for level in range(LEVELS))
        ups = sum(1 << level for level in range(1, LEVELS + 1))
        between = block * self.blocks * self.inter_layers << LEVELS
        pixel = 1 << LEVELS
        return -(-(layers + ups + between + 1) // pixel) * pixel


def read_rmvpe(path: str | Path) -> tuple[RmvpeConfig, dict[str, Tensor]]:
    """Read the network's widths, and its tensors as views of the mapped file, without the weights.

    Raises: CheckpointError: when the file is not such a network's (the message names keys).
    """
    content, _ = load_weights(path)
    inner = content.get("model", content)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path} has a {type(inner).__name__} as 'model', not weights")
    tensors = {
        key: value
        for key, value in inner.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    config = _config_of(path, tensors)
    _require_fit(path, inner, tensors, key_shapes(config))
    return config, tensors


def key_shapes(config: RmvpeConfig) -> dict[str, tuple[int, ...]]:
    """Return every key of the published state dict and its shape, in order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def block(name: str, n_in: int, n_out: int) -> None:
        shapes[f"{name}.conv.0.weight"] = (n_out, n_in, 3, 3)
        norm(f"{name}.conv.1", n_out)
        shapes[f"{name}.conv.3.weight"] = (n_out, n_out, 3, 3)
        norm(f"{name}.conv.4", n_out)
        if n_in != n_out:
            shapes[f"{name}.shortcut.weight"] = (n_out, n_in, 1, 1)
            shapes[f"{name}.shortcut.bias"] = (n_out,)

    def layer(name: str, n_in: int, n_out: int) -> None:
        for i in range(config.blocks):
            block(f"{name}.{i}", n_in if i == 0 else n_out, n_out)

    widths = config.widths
    norm("unet.encoder.bn", 1)
    for i in range(LEVELS):
        layer(f"unet.encoder.layers.{i}.conv", widths[i - 1] if i else 1, widths[i])
    for i in range(config.inter_layers):
        layer(f"unet.intermediate.layers.{i}.conv", widths[-2 if i == 0 else -1], widths[-1])
    if config.timbre_filter:
        for i, width in enumerate(widths[:-1]):
            block(f"{_FILTER}layers.{i}", width, width)
    for i in range(LEVELS):
        n_in, n_out = widths[-1 - i], widths[-2 - i]
        name = f"unet.decoder.layers.{i}"
        shapes[f"{name}.conv1.0.weight"] = (n_in, n_out, 3, 3)  # transposed: inputs come first
        norm(f"{name}.conv1.1", n_out)
        layer(f"{name}.conv2", 2 * n_out, n_out)
    shapes["cnn.weight"] = (MAPS, config.channels, 3, 3)
    shapes["cnn.bias"] = (MAPS,)
    for end in ("", "_reverse"):
        shapes[f"fc.0.gru.weight_ih_l0{end}"] = (3 * config.hidden, MAPS * NUM_MELS)
        shapes[f"fc.0.gru.weight_hh_l0{end}"] = (3 * config.hidden, config.hidden)
        shapes[f"fc.0.gru.bias_ih_l0{end}"] = (3 * config.hidden,)
        shapes[f"fc.0.gru.bias_hh_l0{end}"] = (3 * config.hidden,)
    shapes["fc.1.weight"] = (NUM_BINS, 2 * config.hidden)
    shapes["fc.1.bias"] = (NUM_BINS,)
    return shapes


def _config_of(path: str | Path, tensors: Mapping[str, Tensor]) -> RmvpeConfig:
    def count(pattern: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    def width(key: str, ndim: int, axis: int) -> int:
        if key not in tensors:
            raise CheckpointError(f"{path} is not an RMVPE: it lacks {key}")
        shape = tuple(tensors[key].shape)
        if len(shape) != ndim:
            raise CheckpointError(f"{path}: {key} has shape {shape}; it must have {ndim} axes")
        return shape[axis]

    config = RmvpeConfig(
        channels=width("unet.encoder.layers.0.conv.0.conv.0.weight", 4, 0),
        blocks=count(r"unet\.encoder\.layers\.0\.conv\.(\d+)\."),
        inter_layers=count(r"unet\.intermediate\.layers\.(\d+)\."),
        hidden=width("fc.0.gru.weight_hh_l0", 2, 1),
        timbre_filter=any(key.startswith(_FILTER) for key in tensors),
    )
    if 0 in (config.channels, config.inter_layers, config.hidden):
        raise CheckpointError(
            f"{path} is not an RMVPE: it has {config.channels} channels, {config.inter_layers} "
            f"layers between encoder and decoder, and a GRU of width {config.hidden}"
        )
    return config


def _require_fit(
    path: str | Path,
    content: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    missing = [key for key in shapes if key not in tensors]
    unknown = [str(key) for key in content if key not in shapes]
    not_floats = [
        f"{key} ({tensors[key].dtype})"
        for key in shapes
        if key in tensors
        and not tensors[key].is_floating_point()
        and not key.endswith("num_batches_tracked")
    ]
    misshapen = [
        f"{key} (is {tuple(tensors[key].shape)}, must be {shape})"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    faults = [
        f"{what} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for what, keys in (
            ("lacks", missing),
            ("has other shapes:", misshapen),
            ("has no floating-point tensor for", not_floats),
            ("has unknown keys:", unknown),
        )
        if keys
    ]
    if faults:
        raise CheckpointError(f"{path} does not match RMVPE: it {'; it '.join(faults)}")
