"""Reading ahead: in order, bounded, and without threads left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.batch_order import BatchOrder
from pipeline.dataset.prefetch import read_ahead, stream


def loaders() -> int:
    return sum(thread.name.startswith("loader") for thread in threading.enumerate())


def test_items_are_read_in_order_and_at_most_so_many_early() -> None:
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return -item

    with closing(read_ahead(read, range(20), ahead=2)) as results:
        assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
        time.sleep(0.05)
        assert begun == list(range(len(begun))) and len(begun) <= 7
        assert loaders() == 1
    assert loaders() == 0
    assert list(read_ahead(read, range(3), ahead=5)) == [0, -1, -2]
    assert list(read_ahead(read, [])) == []


def test_an_exception_of_the_thread_is_raised_where_it_is_due() -> None:
    def read(item: int) -> float:
        return 1 / (3 - item)

    results = read_ahead(read, range(9))
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert loaders() == 0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    st.integers(1, 4),
    st.integers(0, 30),
)
def test_a_stream_has_the_share_of_every_batch_from_any_step(
    sizes: list[int], pairs: int, worker: tuple[int, int], shuffle_groups: int, start: int
) -> None:
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    frames = np.arange(len(group)) + 1
    order = BatchOrder(group, frames, 2 * pairs, shuffle_groups, seed=7)
    rank, world_size = worker
    reads: list[tuple[int, int]] = []

    def read(number: int, clips: np.ndarray) -> list[int | None]:
        assert (group[clips] == number).all()
        reads.append((number, len(clips)))
        return [int(clip) for clip in clips]

    def make(step: int, clips: np.ndarray, cells: list[int]) -> tuple[int, list[int], list[int]]:
        return step, clips.tolist(), cells

    steps = order.steps_per_epoch
    expected: Iterator[tuple[int, list[int]]] = (
        (step, order.epoch(step // steps)[step % steps].tolist()) for step in range(start, 10**9)
    )
    with closing(
        stream(
            order,
            read,
            make,
            start_step=start,
            rank=rank,
            world_size=world_size,
            threads=2,
            prefetch=2,
        )
    ) as batches:
        for got, (step, clips) in zip(islice(batches, 2 * steps), expected, strict=False):
            assert got == (step, clips, clips[rank::world_size])
    assert loaders() == 0
