"""Masks, random segments, expansion of units to the frame clock, and volume.

B batch, C channels, D unit width, F frames, T samples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.synthesizer.blocks.noise import Noise

Array = NDArray[np.float32]


def sequence_mask(lengths: Tensor, max_length: int | None = None) -> Tensor:
    """Build a bool mask (B, max_length), True before each length; None: the longest length."""
    if max_length is None:
        max_length = int(lengths.max())
    return torch.arange(max_length, device=lengths.device) < lengths.unsqueeze(1)


def random_starts(lengths: Tensor, size: int, noise: Noise) -> Tensor:
    """Draw starts (B,) int64 of segments of `size` frames, uniformly from 0 to lengths - size.

    lengths: (B,) int64. The segment of a clip shorter than `size` starts at 0.
    """
    last = (lengths - size).clamp(min=0)
    fraction = noise.uniform(torch.zeros_like(lengths, dtype=torch.float32))
    return (fraction * (last + 1)).long()


def slice_segments(x: Tensor, starts: Tensor, size: int) -> Tensor:
    """Slice segments (B, C, size) of x (B, C, F), example i from starts[i] (int64) on.

    Raises: ValueError: when x is shorter than a segment.
    """
    if x.shape[-1] < size:
        raise ValueError(f"a segment of {size} frames does not fit into {x.shape[-1]} frames")
    index = starts.unsqueeze(1) + torch.arange(size, device=x.device)  # (B, size)
    return x.gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


def expand_units(units: Array, frames: int, mode: Literal["nearest", "left"]) -> Array:
    """Expand units (N, D) to the frame clock: (frames, D).

    The two rules of so-vits-svc. They differ by rounding, about one frame in a few clips, and where
    there are more units than frames: "left" then takes the first ones, one per frame.

    Raises: ValueError: when there are no units.
    """
    if len(units) == 0:
        raise ValueError("there are no units to expand")
    index = _nearest(len(units), frames) if mode == "nearest" else _left(len(units), frames)
    return units[index]


def _nearest(source: int, target: int) -> NDArray[np.int64]:
    scale = np.float32(source) / np.float32(target)
    return np.minimum((np.arange(target, dtype=np.float32) * scale).astype(np.int64), source - 1)


def _left(source: int, target: int) -> NDArray[np.int64]:
    """Advance by one unit where a frame reaches the end of its unit, but never by two."""
    ends = (np.arange(1, source) * target).astype(np.float32) / np.float32(source)
    frame = np.arange(target)
    reached = np.searchsorted(ends, frame.astype(np.float32), side="right")
    return frame + np.minimum.accumulate(reached - frame)


def volume_of(wav: Array, hop_length: int) -> Array:
    """Compute the RMS (T // hop_length,) of the hop around the start of each frame of wav (T,).

    The clip is padded by reflection. Source: so-vits-svc (commit 730930d).

    Raises: ValueError: when the clip is shorter than a frame.
    """
    frames = len(wav) // hop_length
    if frames == 0:
        raise ValueError(f"a clip of {len(wav)} samples has no frame of {hop_length}")
    before = hop_length // 2
    padded = np.pad(np.square(wav), (before, hop_length - before), mode="reflect")
    hops = padded[: frames * hop_length].reshape(frames, hop_length)
    return np.sqrt(hops.mean(axis=1))
