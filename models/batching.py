"""Batches by padded length, and windows for inputs too long for one pass."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)
T = TypeVar("T")


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices into batches, longest first, so that rows times longest is within `budget`.

    Clips of similar length share a batch, so there is little padding. A clip longer than the budget
    is a batch of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room < 1:
            batches.append([])
            room = budget // max(1, lengths[i])
        batches[-1].append(i)
        room -= 1
    return batches


class Batcher:
    """Runner of clips in batches that halves its budget when the GPU runs out of memory."""

    def __init__(self, budget: int) -> None:
        """Set the budget: padded length of a batch, in the unit of the lengths given to `map`."""
        self.budget = budget
        self._warned = False

    def map(self, lengths: Sequence[int], run: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Apply `run` to batches; return one result per clip, in the clips' order.

        run: takes the indices of a batch and returns one result for each. It may be called again
        for clips of a batch that did not fit.

        Raises: OutOfMemoryError: when a single clip does not fit (torch's exception).
        """
        results: dict[int, T] = {}
        waiting = plan_batches(lengths, self.budget)[::-1]
        while waiting:
            batch = waiting.pop()
            try:
                results.update(zip(batch, run(batch), strict=True))
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            self._halve()  # outside `except`, because the traceback keeps the batch's memory
            rest = [i for later in waiting for i in later] + batch
            plan = plan_batches([lengths[i] for i in rest], self.budget)
            waiting = [[rest[i] for i in indices] for indices in plan][::-1]
        return [results[i] for i in range(len(lengths))]

    def _halve(self) -> None:
        self.budget = max(1, self.budget // 2)
        torch.cuda.empty_cache()
        if not self._warned:
            _log.warning("the GPU's memory is too small for the planned batches; halving them")
            self._warned = True


@dataclass(frozen=True)
class Window:
    """A stretch to compute, [start, stop), and the part of it to keep, [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def windows(length: int, size: int, overlap: int) -> list[Window]:
    """Return windows of `size` that cover `length` and overlap by `overlap` or more.

    The seam of two windows is in the middle of their overlap. There is one window if all fits. The
    last window has the full size and ends at `length`.
    """
    if length <= size:
        return [Window(0, length, 0, length)]
    starts = [*range(0, length - size, size - overlap), length - size]
    seams = [
        0,
        *((b + a + size) // 2 for a, b in itertools.pairwise(starts)),
        length,
    ]
    return [Window(a, a + size, seams[i], seams[i + 1]) for i, a in enumerate(starts)]
