"""Random numbers of training: each follows from a seed and the names of its use.

A step does not depend on the random numbers that were drawn before it, so a resumed run has the
numbers of an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import torch

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.noise import KeyedNoise


def hashed_key(*parts: int | str) -> int:
    """Return 63 bits that follow from `parts`."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_networks(seed: int) -> None:
    """Seed torch for the initial weights."""
    torch.manual_seed(hashed_key(seed, "networks"))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch for the dropout of one process in one step."""
    torch.manual_seed(hashed_key(seed, step, rank))


def clip_noise(batch: Batch, step: int, device: torch.device) -> KeyedNoise:
    """Return the noise of the clips of a batch in one step, the same in any batch or process."""
    return KeyedNoise([hashed_key(key, step) for key in batch.noise_keys], device)
