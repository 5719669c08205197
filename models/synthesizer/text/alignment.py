"""Monotonic alignment search: the path through symbols and frames.

Source: Kim et al., "Glow-TTS: A Generative Flow for Text-to-Speech via Monotonic Alignment Search"
(2020), algorithm 1.

B batch, C latent channels, N symbols, F frames.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_NEVER = np.float32(-1e9)  # score of an impossible step


def log_likelihood(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute (B, F, N): log density of each frame of z (B, C, F) under each symbol's distribution.

    mean, log_std: (B, C, N). At least float32, even under autocast.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, mean, log_std = (t.to(wide) for t in (z, mean, log_std))
        precision = torch.exp(-2 * log_std)
        constant = (-0.5 * math.log(2 * math.pi) - log_std).sum(1, keepdim=True)  # (B, 1, N)
        squares = (-0.5 * z.square()).transpose(1, 2) @ precision
        products = z.transpose(1, 2) @ (mean * precision)
        return constant + squares + products + (-0.5 * mean.square() * precision).sum(1, True)


def monotonic_path(score: Tensor, symbols: Tensor, frames: Tensor) -> Tensor:
    """Find the path with the highest total score: (B, F, N) of 0 and 1 in score's dtype.

    A path starts at the first symbol, ends at the last, and stays or advances by one symbol from
    frame to frame. On a tie it stays.

    score: (B, F, N), any device; the search runs on the CPU, in float32. symbols, frames: (B,)
    numbers of symbols and frames without padding.

    Raises: ValueError: when there are fewer frames than symbols, no symbols, or more of either than
    in `score`.
    """
    _check(score, symbols.tolist(), frames.tolist())
    values = score.detach().to("cpu", torch.float32).contiguous().numpy()
    counts = (count.to("cpu", torch.int64).numpy() for count in (symbols, frames))
    path = torch.from_numpy(_search(values, *counts)).to(score.device)
    return (path.unsqueeze(-1) == torch.arange(score.shape[2], device=score.device)).to(score)


def _check(score: Tensor, symbols: list[int], frames: list[int]) -> None:
    _, most_frames, most_symbols = score.shape
    for n, f in zip(symbols, frames, strict=True):
        if n > f:
            raise ValueError(
                f"{n} symbols do not fit into {f} frames: each needs at least one; drop this clip"
            )
        if not 1 <= n <= most_symbols or f > most_frames:
            raise ValueError(
                f"there are {n} symbols and {f} frames, but scores for 1 to {most_symbols} symbols "
                f"and {most_frames} frames"
            )


@numba.njit(nogil=True)
def _search(
    score: NDArray[np.float32], symbols: NDArray[np.int64], frames: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the symbol of each frame (B, F), -1 in padding."""
    path = np.full(score.shape[:2], -1, np.int64)
    for example in range(len(score)):
        n, f = symbols[example], frames[example]
        best = np.full(n, _NEVER, np.float32)  # best score of a path to each symbol so far
        advanced = np.zeros((f, n), np.bool_)  # the best path comes from the previous symbol
        for y in range(f):
            for x in range(min(n, y + 1) - 1, -1, -1):  # best[x - 1] is not yet updated
                stay = best[x]
                if x > 0:
                    advance = best[x - 1]
                    advanced[y, x] = stay < advance or x == y
                else:
                    advance = np.float32(0) if y == 0 else _NEVER
                best[x] = score[example, y, x] + max(stay, advance)
        x = n - 1
        for y in range(f - 1, -1, -1):
            path[example, y] = x
            x -= advanced[y, x]
    return path


def path_of_durations(durations: Tensor, frames: int) -> Tensor:
    """Build the path (B, F, N) of 0 and 1 in which each symbol lasts its number of frames.

    durations: (B, N), whole numbers; the path has their dtype. Frames beyond `frames` are dropped.
    """
    ends = torch.cumsum(durations.long(), dim=1)  # exact in any dtype
    time = torch.arange(frames, device=durations.device).unsqueeze(-1)  # (F, 1)
    before_end = (time < ends.unsqueeze(1)).to(durations)  # (B, F, N)
    return before_end - F.pad(before_end, (1, 0))[..., :-1]
