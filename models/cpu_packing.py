"""Fast matrix products on a CPU for inference.

These use oneDNN's kernels with weights packed once. PyTorch's `linear` calls MKL, which leaves half
of some processors unused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def can_pack(weight: Tensor) -> bool:
    """Check that oneDNN can pack this weight and that this build of PyTorch has oneDNN."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on a CPU, optionally followed by exact GELU (erf)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        super().__init__()
        self.weight = weight.detach().to_mkldnn()
        self.bias = None if bias is None else bias.detach().contiguous()
        self.post = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (..., n_in): (..., n_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.post)
