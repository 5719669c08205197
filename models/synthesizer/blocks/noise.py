"""Where a network's random numbers come from: the caller says, not a global generator.

Each example has a generator of its own, from a key. So what is drawn for a clip depends on neither
its neighbours in the batch nor the number of processes, and a step that is done again draws the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_PLACED = 256  # frames whose numbers `PlacedNoise` draws together


class Noise(Protocol):
    """Random numbers in the shape, dtype and device of `like` (B, ...)."""

    def normal(self, like: Tensor) -> Tensor: ...

    def uniform(self, like: Tensor) -> Tensor:
        """In [0, 1)."""
        ...

    def between(self, like: Tensor, low: float, high: float) -> Tensor: ...


class KeyedNoise:
    """Example i draws from a generator that `keys[i]` seeds, in the order of the calls."""

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
            raise ValueError(f"{len(like)} examples, but keys for {len(self._generators)}")
        device = self._generators[0].device
        drawn = [
            draw(like.shape[1:], generator=generator, device=device)
            for generator in self._generators
        ]
        return torch.stack(drawn).to(like)


class NoNoise:
    """0, one constant for `uniform`, and the middle: what the references were made with."""

    def __init__(self, uniform: float = 0.0) -> None:
        self._uniform = uniform

    def normal(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self._uniform)

    def between(self, like: Tensor, low: float, high: float) -> Tensor:
        return torch.full_like(like, (low + high) / 2)


class PlacedNoise:
    """One example whose numbers belong to places of a song: wherever two stretches of it overlap,
    both draw the same.

    seed: of the song. start, frames: the stretch, on the song's frame clock; `start` may be
    negative. What is drawn is (1, C, frames) or (1, C, frames * hop_length).
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
        each, rest = divmod(length, self._frames)  # numbers a frame
        if batch != 1 or rest or each not in (1, self._hop_length):
            raise ValueError(f"{tuple(like.shape)} are no numbers for {self._frames} frames of one")
        first, last = self._start // _PLACED, (self._start + self._frames - 1) // _PLACED
        blocks = []
        for block in range(first, last + 1):
            name = f"{self._seed} {draw.__name__} {channels} {each} {block}".encode()
            key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
            generator = torch.Generator(self._device).manual_seed(key)
            shape = (1, *channels, _PLACED * each)
            blocks.append(draw(shape, generator=generator, device=self._device))
        skip = (self._start - first * _PLACED) * each
        return torch.cat(blocks, dim=-1)[..., skip : skip + length].to(like)
