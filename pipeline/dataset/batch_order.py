"""Which clips make which batch, and which songs only validate: pure functions of names and seeds.

The numbers come from `random_raw` of NumPy's bit generators and from BLAKE2, which other versions
of the libraries do not change.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Clips = NDArray[np.int64]


def epoch_order(
    starts: Clips,
    frames: Clips,
    *,
    batch_size: int,
    shuffle_groups: int,
    seed: int,
    epoch: int,
) -> Clips:
    """The clips of each step of an epoch, (steps, batch_size), numbered from 0 on.

    starts: (G + 1,), row group g has the clips starts[g] to starts[g + 1]. frames: (N,), of a clip.

    Row groups come in random order. The clips of `shuffle_groups` of them at a time are mixed and
    make batches of about one length, which come in random order too; what is left over of them is
    mixed with the next ones. The last batch is filled up with the first clips of the epoch. So
    each clip comes once, but for those that come again at the end.
    """
    bits = np.random.PCG64([seed % 2**64, epoch])
    groups = _shuffled(np.arange(len(starts) - 1), bits)
    batches = []
    left = np.empty(0, np.int64)
    for first in range(0, len(groups), shuffle_groups):
        pooled = groups[first : first + shuffle_groups]
        clips = [np.arange(starts[g], starts[g + 1]) for g in pooled]
        mixed = _shuffled(np.concatenate([left, *clips]), bits)
        whole = len(mixed) // batch_size * batch_size
        batches.append(_by_length(mixed[:whole], frames, batch_size, bits))
        left = mixed[whole:]
    order = np.concatenate(batches)
    if len(left):
        epoch_so_far = np.concatenate([order.ravel(), left])
        last = np.concatenate([left, np.resize(epoch_so_far, batch_size - len(left))])
        order = np.concatenate([order, last[None]])
    return order


def _by_length(clips: Clips, frames: Clips, batch_size: int, bits: np.random.PCG64) -> Clips:
    """Whole batches of clips of about one length, (steps, batch_size).

    A clip counts as up to a quarter longer than it is, so that a small dataset is not cut into the
    same batches in each epoch.
    """
    longer = 1 + bits.random_raw(len(clips)) / 2.0**66
    about_sorted = clips[np.argsort(frames[clips] * longer, kind="stable")]
    return _shuffled(about_sorted.reshape(-1, batch_size), bits)


def _shuffled(values: Clips, bits: np.random.PCG64) -> Clips:
    return values[np.argsort(bits.random_raw(len(values)), kind="stable")]


def held_back(
    song_ids: Sequence[str], speakers: Sequence[str], share: float, seed: int
) -> frozenset[str]:
    """The songs that validate: about `share` of all, and one at least where there are two or more.

    speakers: who sings each song. No speaker loses the last song to train with, so there may be
    fewer, and none where each speaker has one song.
    """
    if share == 0 or len(song_ids) < 2:
        return frozenset()
    wanted = max(1, round(share * len(song_ids)))
    to_train = Counter(speakers)
    held: set[str] = set()
    for song, speaker in sorted(
        zip(song_ids, speakers, strict=True), key=lambda pair: _rank(pair[0], seed)
    ):
        if len(held) < wanted and to_train[speaker] > 1:
            to_train[speaker] -= 1
            held.add(song)
    return frozenset(held)


def _rank(song_id: str, seed: int) -> tuple[bytes, str]:
    digest = hashlib.blake2b(f"{seed}\0{song_id}".encode(), digest_size=8).digest()
    return digest, song_id
