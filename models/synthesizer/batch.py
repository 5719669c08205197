"""What a synthesizer learns from at a time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of several lengths, with zeros after each: float32 but for the whole numbers.

    B batch, D unit width, F frames of the longest clip, T = F * hop_length samples.
    """

    clip_ids: tuple[str, ...]
    units: Tensor  # (B, D, F) on the frame clock
    f0: Tensor  # (B, F) Hz, continued through unvoiced frames
    voiced: Tensor  # (B, F) 1 = voiced
    volume: Tensor  # (B, F) RMS of each frame
    wav: Tensor  # (B, T)
    speaker: Tensor  # (B,) int64
    lengths: Tensor  # (B,) int64, frames
    noise_keys: tuple[int, ...]  # one an example, of seed, epoch and clip

    def __len__(self) -> int:
        return len(self.clip_ids)

    def to(self, device: torch.device | str) -> Batch:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def part(self, index: int, parts: int) -> Batch:
        """Part `index` of `parts` equal ones, for accumulation; len(self) is a multiple of them."""
        size = len(self) // parts
        chosen = slice(index * size, (index + 1) * size)
        return Batch(**{f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)})
