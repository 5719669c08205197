"""The order of an epoch and the split by song, for random datasets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.batch_order import epoch_order, held_out_songs

_GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
_SEEDS = st.integers(-(2**63), 2**63)


def order(groups: list[int], batch_size: int, mixed: int, seed: int, epoch: int) -> np.ndarray:
    frames = np.random.default_rng(sum(groups)).integers(30, 800, sum(groups))
    return epoch_order(
        np.cumsum([0, *groups]),
        frames,
        batch_size=batch_size,
        shuffle_groups=mixed,
        seed=seed,
        epoch=epoch,
    )


@given(_GROUPS, st.integers(1, 8), st.integers(1, 5), _SEEDS, st.integers(0, 10**6))
def test_every_clip_comes_and_only_the_last_batch_repeats(
    groups: list[int], batch_size: int, mixed: int, seed: int, epoch: int
) -> None:
    batches = order(groups, batch_size, mixed, seed, epoch)
    clips = sum(groups)
    assert batches.shape == (-(-clips // batch_size), batch_size)
    assert sorted(batches.ravel()[:clips]) == list(range(clips))
    again = batches.ravel()[clips:]
    assert np.array_equal(again, np.resize(batches.ravel()[:clips], len(again)))
    assert np.array_equal(batches, order(groups, batch_size, mixed, seed, epoch))


@given(_GROUPS, st.integers(1, 8), st.integers(1, 5), _SEEDS)
def test_what_is_read_and_not_used_yet_is_what_is_mixed(
    groups: list[int], batch_size: int, mixed: int, seed: int
) -> None:
    batches = order(groups, batch_size, mixed, seed, 0).ravel()[: sum(groups)]
    group_of = np.repeat(np.arange(len(groups)), groups)
    seen: set[int] = set()
    in_memory = 0
    for clip in batches:
        group = int(group_of[clip])
        in_memory += groups[group] if group not in seen else 0
        seen.add(group)
        assert in_memory <= mixed * max(groups) + batch_size - 1
        in_memory -= 1


def test_the_order_is_another_one_with_each_seed_and_epoch() -> None:
    groups = [32] * 20
    orders = [order(groups, 8, 4, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({each.tobytes() for each in orders}) == 9
    # 640 clips in 80 batches: what is together in an epoch is hardly ever together in the next.
    together = [{frozenset(batch) for batch in each.tolist()} for each in orders]
    assert not together[0] & together[1]


def test_a_small_dataset_is_not_cut_into_the_same_batches_each_epoch() -> None:
    frames = np.random.default_rng(0).integers(100, 800, 64)
    batches = {
        frozenset(batch)
        for epoch in range(20)
        for batch in epoch_order(
            np.array([0, 32, 64]), frames, batch_size=4, shuffle_groups=16, seed=0, epoch=epoch
        ).tolist()
    }
    assert len(batches) > 200  # of 320


def test_batches_hold_clips_of_about_one_length() -> None:
    """Padding is what costs. Lengths are even from 30 to 800 frames."""
    frames = np.random.default_rng(0).integers(30, 800, 3200)
    batches = epoch_order(
        np.arange(0, 3201, 32), frames, batch_size=16, shuffle_groups=16, seed=1, epoch=0
    )
    padded = frames[batches].max(axis=1).sum() * 16 / frames.sum()
    unsorted = frames.reshape(-1, 16).max(axis=1).sum() * 16 / frames.sum()
    assert padded < 1.2 < 1.7 < unsorted


def test_the_order_is_this_one() -> None:
    """A run resumes with the same order under other versions of the libraries."""
    frames = np.array([300, 60, 500, 90, 700, 200, 400, 80, 600])
    starts = np.array([0, 3, 5, 9])
    batches = epoch_order(starts, frames, batch_size=4, shuffle_groups=2, seed=1234, epoch=5)
    assert batches.tolist() == [[1, 3, 0, 4], [7, 5, 6, 2], [8, 1, 3, 0]]


_SONGS = st.lists(st.integers(0, 3), min_size=0, max_size=20)


@given(_SONGS, st.floats(0, 0.99), _SEEDS)
def test_songs_are_held_out_and_no_speaker_loses_the_last_one(
    singers: list[int], share: float, seed: int
) -> None:
    songs = [f"song{i}" for i in range(len(singers))]
    speakers = [f"speaker{singer}" for singer in singers]
    held_out = held_out_songs(songs, speakers, share, seed)
    left = {who for song, who in zip(songs, speakers, strict=True) if song not in held_out}
    assert left == set(speakers)
    spare = len(songs) - len(left)
    wanted = max(1, round(share * len(songs))) if share else 0
    assert len(held_out) == min(wanted, spare)
    assert held_out == held_out_songs(songs[::-1], speakers[::-1], share, seed)


def test_held_out_songs_depend_on_the_seed_and_a_larger_share_has_those_of_a_smaller() -> None:
    songs, speakers = [f"song{i}" for i in range(100)], ["ann"] * 100
    few, many = (held_out_songs(songs, speakers, share, 0) for share in (0.05, 0.2))
    assert (len(few), len(many)) == (5, 20) and few < many
    assert few != held_out_songs(songs, speakers, 0.05, 1)
