"""Training batches of the synthesizer.

Tested by tests/models/synthesizer/test_step.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of several lengths, padded with zeros; float32 except where int64 is stated.

    B batch, D unit width, F frames of the longest clip, T = F * hop_length samples.
    """

    clip_ids: tuple[str, ...]
    units: Tensor  # (B, D, F) on the frame clock
    f0: Tensor  # (B, F) Hz, interpolated through unvoiced frames
    voiced: Tensor  # (B, F) 1 = voiced
    volume: Tensor  # (B, F) RMS of each frame
    wav: Tensor  # (B, T)
    speaker: Tensor  # (B,) int64
    lengths: Tensor  # (B,) int64, frames
    noise_keys: tuple[int, ...]  # one per example, from seed, epoch and clip

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
        """Return part `index` of `parts` equal parts; len(self) must be a multiple of `parts`."""
        size = len(self) // parts
        chosen = slice(index * size, (index + 1) * size)
        return Batch(**{f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)})
