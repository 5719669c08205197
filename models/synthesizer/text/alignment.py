"""Which symbol is sung when: the monotonic path through symbols and frames.

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

_NEVER = np.float32(-1e9)  # the score of a way that leaves the path


def log_likelihood(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(B, F, N): log density of each frame of z (B, C, F) under each symbol's normal distribution.

    mean, log_std: (B, C, N). In float32 at least, even under autocast.
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
    """(B, F, N) of 0 and 1 in score's dtype: the path of the highest total score.

    A path begins at the first symbol, ends at the last, and from a frame to the next stays or goes
    on by one symbol. Of equal ways it takes the one that stays.

    score: (B, F, N), any device; the search is on the CPU, in float32. symbols, frames: (B,) how
    many of N and F are real.

    Raises ValueError where there are fewer frames than symbols, or no symbols, or either is more
    than the score has.
    """
    _check(score, symbols.tolist(), frames.tolist())
    values = score.detach().to("cpu", torch.float32).contiguous().numpy()
    counts = (count.to("cpu", torch.int64).numpy() for count in (symbols, frames))
    found = torch.from_numpy(_search(values, *counts)).to(score.device)
    return (found.unsqueeze(-1) == torch.arange(score.shape[2], device=score.device)).to(score)


def _check(score: Tensor, symbols: list[int], frames: list[int]) -> None:
    _, most_frames, most_symbols = score.shape
    for n, f in zip(symbols, frames, strict=True):
        if n > f:
            raise ValueError(
                f"{n} symbols do not fit into {f} frames: each takes one at least; leave such a "
                "clip out"
            )
        if not 1 <= n <= most_symbols or f > most_frames:
            raise ValueError(
                f"{n} symbols and {f} frames, but scores for 1 to {most_symbols} symbols and "
                f"{most_frames} frames"
            )


@numba.njit(nogil=True)
def _search(
    score: NDArray[np.float32], symbols: NDArray[np.int64], frames: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(B, F): the symbol of each frame, -1 in padding."""
    path = np.full(score.shape[:2], -1, np.int64)
    for example in range(len(score)):
        n, f = symbols[example], frames[example]
        best = np.full(n, _NEVER, np.float32)  # of the ways that end here, at the frame before
        came = np.zeros((f, n), np.bool_)  # from the symbol before
        for y in range(f):
            for x in range(min(n, y + 1) - 1, -1, -1):  # downwards: best[x - 1] is still the old
                stay = best[x]
                if x > 0:
                    come = best[x - 1]
                    came[y, x] = stay < come or x == y
                else:
                    come = np.float32(0) if y == 0 else _NEVER
                best[x] = score[example, y, x] + max(stay, come)
        x = n - 1
        for y in range(f - 1, -1, -1):
            path[example, y] = x
            x -= came[y, x]
    return path


def path_of_durations(durations: Tensor, frames: int) -> Tensor:
    """(B, F, N) of 0 and 1: symbol after symbol, each for its whole number of frames.

    durations: (B, N), whole numbers in any dtype, whose dtype the path has. What goes beyond
    `frames` is cut.
    """
    ends = torch.cumsum(durations.long(), dim=1)  # exact in any dtype
    time = torch.arange(frames, device=durations.device).unsqueeze(-1)  # (F, 1)
    before_end = (time < ends.unsqueeze(1)).to(durations)  # (B, F, N)
    return before_end - F.pad(before_end, (1, 0))[..., :-1]
