"""Batches by padded length, and windows for what is too long for one pass."""

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
    """Indices in batches, longest first: rows times longest stays within `budget`.

    Clips of like length meet, so little is padded. What is longer than the budget goes alone.
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
    """Runs clips in batches; halves its budget where the GPU's memory ends, and says so once."""

    def __init__(self, budget: int) -> None:
        """budget: padded length of a batch, in whatever unit `map` gets its lengths."""
        self.budget = budget
        self._told = False

    def map(self, lengths: Sequence[int], run: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """What `run` gives for each clip, in the clips' order.

        run: takes the indices of a batch, gives one result for each. It may be called again for
        clips of a batch that did not fit.
        Raises: torch.OutOfMemoryError when one clip alone does not fit.
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
            self._halve()  # outside `except`: the traceback would hold the batch's memory
            rest = [i for later in waiting for i in later] + batch
            plan = plan_batches([lengths[i] for i in rest], self.budget)
            waiting = [[rest[i] for i in indices] for indices in plan][::-1]
        return [results[i] for i in range(len(lengths))]

    def _halve(self) -> None:
        self.budget = max(1, self.budget // 2)
        torch.cuda.empty_cache()
        if not self._told:
            _log.warning("the GPU's memory is too small for the batches planned: they are halved")
            self._told = True


@dataclass(frozen=True)
class Window:
    """A stretch to compute, [start, stop), and the part of it to keep, [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def windows(length: int, size: int, overlap: int) -> list[Window]:
    """Windows of `size` that cover `length`, neighbours sharing `overlap` or more.

    Each keeps what lies nearer to its middle than to its neighbour's: the seam is in the middle of
    the overlap. One window where all fits. The last one ends with the length and is a full one.
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
