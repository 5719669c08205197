"""Batches and windows: every clip once, in order, within the budget."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.batching import Batcher, plan_batches, windows

LENGTHS = st.lists(st.integers(1, 500), max_size=40)


@given(LENGTHS, st.integers(1, 1000))
def test_batches_hold_every_clip_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


def test_like_lengths_meet() -> None:
    assert plan_batches([10, 100, 11, 99, 9], 200) == [[1, 3], [2, 0, 4]]


class Gpu:
    """A fake GPU that doubles numbers and has memory for a padded length."""

    def __init__(self, lengths: list[int], memory: int) -> None:
        self.lengths, self.memory = lengths, memory
        self.calls: list[list[int]] = []

    def __call__(self, batch: list[int]) -> list[int]:
        self.calls.append(batch)
        if len(batch) * max(self.lengths[i] for i in batch) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * self.lengths[i] for i in batch]


@given(LENGTHS, st.integers(500, 4000), st.integers(500, 4000))
def test_results_come_in_order_however_small_the_memory(
    lengths: list[int], budget: int, memory: int
) -> None:
    gpu = Gpu(lengths, memory)
    assert Batcher(budget).map(lengths, gpu) == [2 * length for length in lengths]


def test_the_budget_halves_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [100] * 16
    gpu = Gpu(lengths, memory=400)
    batcher = Batcher(1600)
    with caplog.at_level(logging.WARNING):
        batcher.map(lengths, gpu)
        assert batcher.budget == 400
        assert len(caplog.records) == 1
        gpu.calls.clear()
        batcher.map(lengths, gpu)
    assert [len(batch) for batch in gpu.calls] == [4, 4, 4, 4]  # it has learnt
    assert len(caplog.records) == 1


def test_a_clip_that_alone_is_too_much_is_an_error() -> None:
    lengths = [100, 900, 100]
    with pytest.raises(torch.OutOfMemoryError):
        Batcher(2000).map(lengths, Gpu(lengths, memory=500))


def test_other_faults_are_not_taken_for_memory() -> None:
    def broken(batch: list[int]) -> list[int]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Batcher(10).map([1, 2], broken)


@given(st.integers(1, 5000), st.integers(2, 600), st.data())
def test_windows_cover_everything_once(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    cut = windows(length, size, overlap)
    assert [w.first for w in cut] == [0, *(w.last for w in cut[:-1])]
    assert cut[-1].last == length
    for w in cut:
        assert 0 <= w.start <= w.first < w.last <= w.stop <= length
        assert w.stop - w.start == min(size, length)
    for a, b in itertools.pairwise(cut):
        assert a.stop - b.start >= overlap
        assert abs((a.stop - a.last) - (b.first - b.start)) <= 1  # the seam is in the middle


def test_a_seam_has_surroundings_on_both_sides() -> None:
    first, second, last = windows(250, 100, 20)
    assert (first.start, first.stop, first.last) == (0, 100, 90)
    assert (second.start, second.stop, second.last) == (80, 180, 165)
    assert (last.start, last.stop) == (150, 250)
