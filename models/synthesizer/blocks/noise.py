"""Random numbers of a network, from a source that the caller passes in.

Each example has its own generator, seeded by a key. So the numbers of a clip depend neither on the
other clips in the batch nor on the number of processes, and a repeated step draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_BLOCK = 256  # frames that `PlacedNoise` draws together


class Noise(Protocol):
    """Random numbers in the shape, dtype and device of `like` (B, ...)."""

    def normal(self, like: Tensor) -> Tensor: ...

    def uniform(self, like: Tensor) -> Tensor:
        """Draw from [0, 1)."""
        ...

    def between(self, like: Tensor, low: float, high: float) -> Tensor: ...


class KeyedNoise:
    """Noise whose example i comes from a generator seeded by `keys[i]`, in the order of calls."""

    def __init__(self, keys: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]

    def normal(self, like: Tensor) -> Tensor:
        return self._each(torch.randn, like)

    def uniform(self, like: Tensor) -> Tensor:
        return self._each(torch.rand, like)

    def between(self, like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * self.uniform(like)

    def _each(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        if len(like) != len(self._generators):
            raise ValueError(f"{len(like)} examples, but {len(self._generators)} keys")
        device = self._generators[0].device
        numbers = [
            draw(like.shape[1:], generator=generator, device=device)
            for generator in self._generators
        ]
        return torch.stack(numbers).to(like)


class NoNoise:
    """Constants in place of noise: 0, `uniform`, and the middle; used to make the goldens."""

    def __init__(self, uniform: float = 0.0) -> None:
        self._uniform = uniform

    def normal(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self._uniform)

    def between(self, like: Tensor, low: float, high: float) -> Tensor:
        return torch.full_like(like, (low + high) / 2)


class PlacedNoise:
    """Noise of one example that is tied to positions in a song: overlapping stretches agree.

    seed: of the song. start, frames: the stretch, on the song's frame clock; `start` may be
    negative. Shapes are (1, C, frames) or (1, C, frames * hop_length).
    """

    def __init__(
        self,
        seed: int,
        start: int,
        frames: int,
        hop_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._seed, self._start, self._frames = seed, start, frames
        self._hop_length, self._device = hop_length, device

    def normal(self, like: Tensor) -> Tensor:
        return self._drawn(torch.randn, like)

    def uniform(self, like: Tensor) -> Tensor:
        return self._drawn(torch.rand, like)

    def between(self, like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * self.uniform(like)

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        batch, *channels, length = like.shape
        each, rest = divmod(length, self._frames)  # numbers per frame
        if batch != 1 or rest or each not in (1, self._hop_length):
            raise ValueError(
                f"the shape {tuple(like.shape)} does not fit one example of {self._frames} frames"
            )
        first, last = self._start // _BLOCK, (self._start + self._frames - 1) // _BLOCK
        blocks = []
        for block in range(first, last + 1):
            name = f"{self._seed} {draw.__name__} {channels} {each} {block}".encode()
            key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
            generator = torch.Generator(self._device).manual_seed(key)
            shape = (1, *channels, _BLOCK * each)
            blocks.append(draw(shape, generator=generator, device=self._device))
        skip = (self._start - first * _BLOCK) * each
        return torch.cat(blocks, dim=-1)[..., skip : skip + length].to(like)
