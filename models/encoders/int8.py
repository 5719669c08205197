"""Linear layers in 8-bit integers on a CPU: about four times as fast as float32, and not exact.

Weights are quantised once, symmetrically, with one scale per output. Inputs are quantised per call,
each row (a frame) from its own minimum to its own maximum, so that the result of a clip never
depends on another clip. With x = lo + step * q and w = scale * v,

    x w = step * scale * sum(q v) + lo * scale * sum(v)

where the first sum is oneDNN's integer product and the last one is precomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """`nn.Linear` for inference, optionally followed by GELU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        """Quantise weight (n_out, n_in), float32, on the CPU."""
        super().__init__()
        weight = weight.detach()
        self.n_out = len(weight)
        self.scale = weight.abs().amax(1).clamp_min(1e-30) / 127
        rounded = (weight / self.scale[:, None]).round()
        self.lo_weight = self.scale * rounded.sum(1)
        self.bias = torch.zeros(self.n_out) if bias is None else bias.detach().clone()
        self.weight = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)
        self.zeros = torch.zeros(self.n_out, dtype=torch.int32)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (..., n_in): (..., n_out)."""
        rows = x.reshape(-1, x.shape[-1])
        lo = rows.amin(1, keepdim=True)
        step = (rows.amax(1, keepdim=True) - lo).clamp_min_(1e-30) / 255
        # Through int8, because that cast is vectorised; flipping the top bit makes it unsigned.
        q = (rows - (lo + 128 * step)).mul_(1 / step).round_().to(torch.int8)
        q = q.view(torch.uint8).bitwise_xor_(128)
        product = _product(q, self.weight, self.scale, self.zeros)
        y = torch.addcmul(torch.addcmul(self.bias, lo, self.lo_weight), product, step)
        return (F.gelu(y) if self.gelu else y).view(*x.shape[:-1], self.n_out)


def _product(q: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Multiply (rows, n_in) uint8 by a packed int8 weight: (rows, n_out) float32, scaled."""
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 0, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def require_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Check that int8 is supported.

    Raises: ValueError: when the device is a GPU or an old CPU, or the dtype is not float32.
    """
    if device.type != "cpu":
        raise ValueError(f"encoder.int8 works only on a CPU, not on {device}: leave it out")
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"encoder.int8 works with encoder.dtype=float32, not with {name}")
    if not _is_exact():
        raise ValueError(
            "encoder.int8 needs PyTorch with oneDNN and a CPU with 8-bit dot products "
            "(AVX-512 VNNI): leave it out"
        )


def _is_exact() -> bool:
    """Check that the integer product exists and does not saturate, as on a CPU without VNNI."""
    try:
        weight = torch.full((16, 64), 127, dtype=torch.int8)
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
        q = torch.full((4, 64), 255, dtype=torch.uint8)
        product = _product(q, weight, torch.ones(16), torch.zeros(16, dtype=torch.int32))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((product == 64 * 255 * 127).all())
