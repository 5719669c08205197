"""Quantization noise: random blocks of the weights are zeroed in training.

Fan et al. (2020), "Training with Quantization Noise for Extreme Model Compression", in its simplest
form: a network trained this way tolerates a later product quantization by blocks. The stored
weights do not change; only the forward pass has noise, with a straight-through gradient to every
weight (fairseq draws the same noise but writes it into the stored weights).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.encoders.wav2vec2 import Attention, FeedForward, Wav2Vec2


def quant_noise(module: nn.Module, p: float, block_size: int) -> nn.Module:
    """Add noise to the weight of `module` in training, in place; p=0: nothing.

    A share `p` of the blocks is zero and the others are scaled by 1 / (1 - p). A block is
    `block_size` neighbouring inputs of one output (Linear, Embedding, convolutions of kernel 1), or
    the whole kernel between an input and an output channel (other convolutions). The state dict has
    `parametrizations.weight.original` for `weight` until `without_quant_noise`.

    Raises: ValueError: when the module is of another kind, `block_size` does not divide its size,
    or `p` is outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"the share of noisy blocks is {p}; it must be in 0 to below 1")
    if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d):
        raise ValueError(
            "quantization noise supports Linear, Embedding, Conv1d and Conv2d, "
            f"not {type(module).__name__}"
        )
    size, what = _divided(module.weight)
    if block_size < 1 or size % block_size:
        raise ValueError(f"blocks of {block_size} do not divide the {size} {what}")
    if p > 0:
        noise = BlockNoise(p, block_size).train(module.training)
        # unsafe, because the check would draw from the generator
        parametrize.register_parametrization(module, "weight", noise, unsafe=True)
    return module


def with_quant_noise(network: Wav2Vec2, p: float, block_size: int = 8) -> Wav2Vec2:
    """Add noise to every linear layer of the attention and feed-forward blocks, in place."""
    for module in network.layers.modules():
        if isinstance(module, Attention):
            linears = [module.qkv, module.out]
        elif isinstance(module, FeedForward):
            linears = [module.fc1, module.fc2]
        else:
            continue
        for linear in linears:
            quant_noise(linear, p, block_size)
    return network


def without_quant_noise(network: nn.Module) -> nn.Module:
    """Remove all noise from `network`, in place; the layers keep the stored weights."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight") and any(
            isinstance(part, BlockNoise) for part in module.parametrizations.weight
        ):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return network


class BlockNoise(nn.Module):
    """Parametrization that zeroes a share `p` of a weight's blocks, drawn at every call."""

    def __init__(self, p: float, block_size: int) -> None:
        super().__init__()
        self.p, self.block_size = p, block_size

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        stored = weight.detach()
        block = 1 if _has_kernel(weight) else self.block_size
        n_out, n_in = weight.shape[:2]
        dropped = torch.zeros(n_in // block * n_out, device=weight.device).bernoulli_(self.p)
        dropped = dropped.bool().repeat_interleave(block)
        dropped = dropped.view(n_out, n_in, *[1] * (weight.ndim - 2))
        noisy = stored.masked_fill(dropped, 0) * (1 / (1 - self.p))
        return noisy + (weight - stored)  # adds 0 and the gradient of `weight`


def _has_kernel(weight: Tensor) -> bool:
    return weight[0, 0].numel() > 1


def _divided(weight: Tensor) -> tuple[int, str]:
    """Return the size that blocks must divide, and its name."""
    if _has_kernel(weight):
        return weight[0, 0].numel(), "values of the kernel"
    return weight.shape[1], "inputs"
