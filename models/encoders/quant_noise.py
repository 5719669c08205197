"""Quantization noise: in training, blocks of the weights vanish at random.

Fan et al. (2020), "Training with Quantization Noise for Extreme Model Compression", in the simplest
form that the paper has: a network trained so bears a later product quantization by blocks. What is
stored stays as it is; only the forward pass sees the noise, and the gradient passes straight
through it to every weight (fairseq draws the same noise but writes it into the stored weights).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.encoders.wav2vec2 import Attention, FeedForward, Wav2Vec2


def quant_noise(module: nn.Module, p: float, block_size: int) -> nn.Module:
    """`module`, its weight noisy from now on in training; p=0: as it was.

    A share `p` of the blocks is zero and the others are scaled by 1 / (1 - p). A block is
    `block_size` neighbouring inputs of one output (Linear, Embedding, convolutions of kernel 1), or
    the whole kernel between an input and an output channel (other convolutions). The state dict has
    `parametrizations.weight.original` for `weight` until `without_quant_noise`.

    Raises ValueError for a module of another kind, a size that `block_size` does not divide, and a
    `p` outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"quantization noise takes a share of blocks from 0 to below 1, not {p}")
    if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d):
        raise ValueError(
            "quantization noise is for Linear, Embedding, Conv1d and Conv2d, "
            f"not for {type(module).__name__}"
        )
    size, what = _divided(module.weight)
    if block_size < 1 or size % block_size:
        raise ValueError(f"blocks of {block_size} do not divide the {size} {what}")
    if p > 0:
        noise = BlockNoise(p, block_size).train(module.training)
        # unsafe: the check would draw from the generator.
        parametrize.register_parametrization(module, "weight", noise, unsafe=True)
    return module


def with_quant_noise(network: Wav2Vec2, p: float, block_size: int = 8) -> Wav2Vec2:
    """`network`, with noise on every linear layer of its attention and feed-forward blocks."""
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
    """`network` as it was: plain layers with the stored weights, noise gone wherever it was."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight") and any(
            isinstance(part, BlockNoise) for part in module.parametrizations.weight
        ):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return network


class BlockNoise(nn.Module):
    """A weight -> the weight with a share `p` of its blocks zero, drawn anew at every call."""

    def __init__(self, p: float, block_size: int) -> None:
        super().__init__()
        self.p, self.block_size = p, block_size

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        stored = weight.detach()
        block = 1 if _has_kernel(weight) else self.block_size
        n_out, n_in = weight.shape[:2]
        gone = torch.zeros(n_in // block * n_out, device=weight.device).bernoulli_(self.p)
        gone = gone.bool().repeat_interleave(block).view(n_out, n_in, *[1] * (weight.ndim - 2))
        noisy = stored.masked_fill(gone, 0) * (1 / (1 - self.p))
        return noisy + (weight - stored)  # adds 0, and the gradient of `weight`


def _has_kernel(weight: Tensor) -> bool:
    return weight[0, 0].numel() > 1


def _divided(weight: Tensor) -> tuple[int, str]:
    """What blocks have to divide, and its name."""
    if _has_kernel(weight):
        return weight[0, 0].numel(), "values of the kernel"
    return weight.shape[1], "inputs"
