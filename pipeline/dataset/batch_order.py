"""The order in which clips are used, and the split by song: functions of names and seeds.

The trainer, `distill` and `codebook` share one order: row groups come at random, and what some of
them hold is mixed. The numbers come from `random_raw` of NumPy's bit generators and from BLAKE2,
which do not change with the versions of the libraries.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class BatchOrder:
    """The batches of every epoch. Clips are numbered from 0 in the order of their row groups.

    group: (N,) row group of each clip, ascending. frames: (N,) length of each clip.
    """

    group: NDArray[np.int32]
    frames: Indices
    batch_size: int
    shuffle_groups: int
    seed: int

    def __len__(self) -> int:
        """Clips."""
        return len(self.group)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self) // self.batch_size)

    @cached_property
    def most_clips(self) -> int:
        """The most clips that `shuffle_groups` row groups have."""
        return self.shuffle_groups * int(np.unique(self.group, return_counts=True)[1].max())

    def epoch(self, epoch: int) -> Indices:
        """Return the clips of each step of `epoch`, (steps, batch_size)."""
        _, starts = np.unique(self.group, return_index=True)
        return epoch_order(
            np.append(starts, len(self)),
            self.frames,
            batch_size=self.batch_size,
            shuffle_groups=self.shuffle_groups,
            seed=self.seed,
            epoch=epoch,
        )


def epoch_order(
    starts: Indices,
    frames: Indices,
    *,
    batch_size: int,
    shuffle_groups: int,
    seed: int,
    epoch: int,
) -> Indices:
    """Return the clips of each step of an epoch, (steps, batch_size), numbered from 0.

    starts: (G + 1,); row group g has the clips starts[g] to starts[g + 1]. frames: (N,) of clips.

    Clips are mixed as in `mix_groups` and make batches of similar length, which come in random
    order too. The last batch is filled up with the first clips of the epoch: every clip comes
    once, except those that come again at the end.
    """
    bits = epoch_bits(seed, epoch)
    batches = []
    rest = np.empty(0, np.int64)
    for groups, order in mix_groups(np.diff(starts), batch_size, shuffle_groups, bits):
        clips = [np.arange(starts[group], starts[group + 1]) for group in groups]
        mixed = np.concatenate([rest, *clips])[order]
        whole = len(mixed) // batch_size * batch_size
        batches.append(_by_length(mixed[:whole], frames, batch_size, bits))
        rest = mixed[whole:]
    order = np.concatenate(batches)
    if len(rest):
        epoch_so_far = np.concatenate([order.ravel(), rest])
        last = np.concatenate([rest, np.resize(epoch_so_far, batch_size - len(rest))])
        order = np.concatenate([order, last[None]])
    return order


def mix_groups(
    sizes: Indices, batch_size: int, shuffle_groups: int, bits: np.random.PCG64
) -> Iterator[tuple[Indices, Indices]]:
    """Yield row groups to read and the order of the items at hand, `shuffle_groups` at a time.

    sizes: (G,) items in each row group. Row groups come in random order. The items at hand are
    those that filled no whole batch the last time, followed by those of the row groups; `order`
    permutes them, and what follows its whole batches is left for the next time.
    """
    shuffled = _permutation(len(sizes), bits)
    rest = 0
    for first in range(0, len(shuffled), shuffle_groups):
        groups = shuffled[first : first + shuffle_groups]
        order = _permutation(rest + int(sizes[groups].sum()), bits)
        yield groups, order
        rest = len(order) % batch_size


def epoch_bits(seed: int, epoch: int) -> np.random.PCG64:
    """Return the random bits that an epoch is mixed with."""
    return np.random.PCG64([seed % 2**64, epoch])


def _permutation(count: int, bits: np.random.PCG64) -> Indices:
    return np.argsort(bits.random_raw(count), kind="stable")


def _by_length(clips: Indices, frames: Indices, batch_size: int, bits: np.random.PCG64) -> Indices:
    """Return whole batches of clips of similar length, (steps, batch_size), in random order.

    A clip counts as up to a quarter longer than it is, so that a small dataset is not cut into the
    same batches in each epoch.
    """
    longer = 1 + bits.random_raw(len(clips)) / 2.0**66
    about_sorted = clips[np.argsort(frames[clips] * longer, kind="stable")]
    batches = about_sorted.reshape(-1, batch_size)
    return batches[_permutation(len(batches), bits)]


def held_out_songs(
    song_ids: Sequence[str], speakers: Sequence[str], share: float, seed: int
) -> frozenset[str]:
    """Return the songs to validate with: about `share` of all, and at least one of two or more.

    speakers: the singer of each song. No speaker loses the last song to train with, so there may
    be fewer, and none where each speaker has one song.
    """
    if share == 0 or len(song_ids) < 2:
        return frozenset()
    wanted = max(1, round(share * len(song_ids)))
    to_train = Counter(speakers)
    held_out: set[str] = set()
    for song, speaker in sorted(
        zip(song_ids, speakers, strict=True), key=lambda pair: _rank(pair[0], seed)
    ):
        if len(held_out) < wanted and to_train[speaker] > 1:
            to_train[speaker] -= 1
            held_out.add(song)
    return frozenset(held_out)


def _rank(song_id: str, seed: int) -> tuple[bytes, str]:
    digest = hashlib.blake2b(f"{seed}\0{song_id}".encode(), digest_size=8).digest()
    return digest, song_id
