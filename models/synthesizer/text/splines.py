"""Monotonic rational-quadratic splines: bijections with parameters from a network.

Source: Durkan et al., "Neural Spline Flows" (2019), section 3.1. K is the number of bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_SHARE = 1e-3  # smallest width and height of a bin, as a share of the interval
_MIN_SLOPE = 1e-3
_SLOPE_OF_ONE = math.log(math.expm1(1 - _MIN_SLOPE))  # unnormalised value of the slope 1


def tailed_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    slopes: Tensor,
    *,
    bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply a spline from -bound to bound, the identity beyond: (y, log |dy/dx|), shaped like x.

    widths, heights: (*x.shape, K), slopes: (*x.shape, K - 1) at the inner knots; unnormalised.
    Computed in at least float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, widths, heights, slopes = (t.to(wide) for t in (x, widths, heights, slopes))
    slopes = F.pad(slopes, (1, 1), value=_SLOPE_OF_ONE)
    inside = (x >= -bound) & (x <= bound)
    y, log_slope = rational_quadratic_spline(
        x.clamp(-bound, bound), widths, heights, slopes, low=-bound, high=bound, inverse=inverse
    )
    return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    slopes: Tensor,
    *,
    low: float = 0.0,
    high: float = 1.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply the spline that maps [low, high] onto itself to x in that range: (y, log |dy/dx|).

    widths, heights: (*x.shape, K), slopes: (*x.shape, K + 1) at the knots; unnormalised.
    """
    knots_x, widths = _knots(widths, low, high)
    knots_y, heights = _knots(heights, low, high)
    slopes = _MIN_SLOPE + F.softplus(slopes)

    inner = (knots_y if inverse else knots_x)[..., 1:-1].contiguous()
    bin_index = torch.searchsorted(inner, x.unsqueeze(-1), right=True)

    def in_bin(values: Tensor) -> Tensor:
        return values.gather(-1, bin_index).squeeze(-1)

    left, width = in_bin(knots_x), in_bin(widths)
    bottom, height = in_bin(knots_y), in_bin(heights)
    slope, next_slope = in_bin(slopes), in_bin(slopes[..., 1:])
    mean_slope = height / width
    bend = slope + next_slope - 2 * mean_slope

    if inverse:
        at = _solve((x - bottom), height, mean_slope, slope, bend)
    else:
        at = (x - left) / width  # 0 to 1 within the bin
    both = at * (1 - at)
    below = mean_slope + bend * both
    steepness = mean_slope.square() * (
        next_slope * at.square() + 2 * mean_slope * both + slope * (1 - at).square()
    )
    log_slope = torch.log(steepness) - 2 * torch.log(below)
    if inverse:
        return at * width + left, -log_slope
    return bottom + height * (mean_slope * at.square() + slope * both) / below, log_slope


def _knots(sizes: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return knots (..., K + 1) from low to high and the distances (..., K) between them."""
    bins = sizes.shape[-1]
    shares = _MIN_SHARE + (1 - _MIN_SHARE * bins) * F.softmax(sizes, dim=-1)
    inner = (high - low) * torch.cumsum(shares, dim=-1)[..., :-1] + low
    ends = [F.pad(inner, (1, 0), value=low), torch.full_like(inner[..., :1], high)]
    knots = torch.cat(ends, dim=-1)
    return knots, knots.diff(dim=-1)


def _solve(rise: Tensor, height: Tensor, mean_slope: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """Solve for the position in a bin, 0 to 1, where the spline rose by `rise` (paper, eq. 6-8)."""
    a = rise * bend + height * (mean_slope - slope)
    b = height * slope - rise * bend
    c = -mean_slope * rise
    root = torch.sqrt((b.square() - 4 * a * c).clamp(min=0))
    return 2 * c / (-b - root)
