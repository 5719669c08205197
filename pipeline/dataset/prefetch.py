"""Reads and makes batches ahead of the trainer, in threads, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

C = TypeVar("C")  # what a clip is read as
B = TypeVar("B")  # what a step's clips are made into

Clips = NDArray[np.int64]


@dataclass(frozen=True)
class Visit:
    """A row group that is read once for some clips of an epoch."""

    epoch: int
    group: int
    clips: Clips = field(compare=False)  # in the order of their use; a clip may come twice
    first_use: int  # position in the epoch; no two visits of an epoch have the same


@dataclass(frozen=True)
class EpochPlan:
    """What is read, in the order of its first use, and where position i finds its clip."""

    visits: list[Visit]
    visit_at: Clips  # (P,) place in visits
    slot_at: Clips  # (P,) place in the visit's clips
    first: int  # position of the first of them in the epoch

    def place(self, position: int) -> tuple[Visit, int]:
        """The visit that has the clip of this position, and where in it."""
        at = position - self.first
        return self.visits[self.visit_at[at]], int(self.slot_at[at])


def plan_epoch(
    epoch: int, clips: Clips, groups: Clips, again: NDArray[np.bool_], first: int = 0
) -> EpochPlan:
    """A visit for each row group, and one more for its clips that come again at the end.

    clips, groups, again: (P,) at each position of the epoch from `first` on: the clip, its row
    group, and whether it comes for a second time.
    """
    _, first_use, visit_at = np.unique(groups * 2 + again, return_index=True, return_inverse=True)
    order = np.argsort(first_use)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    visit_at, first_use = rank[visit_at], first_use[order]
    sizes = np.bincount(visit_at)
    ends = np.cumsum(sizes)
    by_visit = np.argsort(visit_at, kind="stable")
    slot_at = np.empty_like(by_visit)
    slot_at[by_visit] = np.arange(len(clips)) - np.repeat(ends - sizes, sizes)
    of_visit = np.split(clips[by_visit], ends[:-1])
    visits = [
        Visit(epoch, int(groups[use]), of_visit[i], first + int(use))
        for i, use in enumerate(first_use)
    ]
    return EpochPlan(visits, visit_at, slot_at, first)


class Shelf(Generic[C]):
    """Row groups that are read before they are needed, while there is room for their clips."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        read: Callable[[Visit], list[C | None]],
        visits: Iterator[Visit],
        room: int,
    ) -> None:
        self._pool, self._read, self._visits = pool, read, visits
        self._next = next(visits)
        self._room = room  # clips
        self._reads: dict[Visit, _Read[C]] = {}

    def take(self, plan: EpochPlan, positions: range) -> list[Slot[C]]:
        """Where the clips at `positions` will be; their reading is under way."""
        epoch = plan.visits[0].epoch
        while self._is_due(epoch, positions.stop) or self._is_welcome(epoch):
            cells = self._pool.submit(self._read, self._next)
            self._reads[self._next] = _Read(cells, len(self._next.clips))
            self._room -= len(self._next.clips)
            self._next = next(self._visits)
        return [self._slot(*plan.place(position)) for position in positions]

    def give_back(self, clips: int) -> None:
        """So many clips are used up."""
        self._room += clips

    def _is_due(self, epoch: int, stop: int) -> bool:
        return (self._next.epoch, self._next.first_use) < (epoch, stop)

    def _is_welcome(self, epoch: int) -> bool:
        return self._next.epoch <= epoch + 1 and len(self._next.clips) <= self._room

    def _slot(self, visit: Visit, slot: int) -> Slot[C]:
        read = self._reads[visit]
        read.unused -= 1
        if read.unused == 0:
            del self._reads[visit]
        return read.cells, slot


Slot = tuple[Future[list[C | None]], int]


@dataclass
class _Read(Generic[C]):
    cells: Future[list[C | None]]
    unused: int


def stream(
    plan_of: Callable[[int], EpochPlan],
    read: Callable[[Visit], list[C | None]],
    make: Callable[[int, list[C]], B],
    *,
    start_step: int,
    steps_per_epoch: int,
    clips_per_step: int,
    room: int,
    threads: int,
    prefetch: int,
) -> Generator[B, None, None]:
    """What `make(step, cells)` gives of each step from `start_step` on, without end.

    read: the clips of a visit. plan_of: of an epoch; asked for in the order of the epochs.
    room: clips to hold; the next `prefetch` steps' are read in any case.
    What a thread raises is raised here. Closed, it leaves no thread behind.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    ahead: deque[Future[B]] = deque()
    try:
        first_epoch = start_step // steps_per_epoch
        visits = (visit for epoch in count(first_epoch) for visit in plan_of(epoch).visits)
        shelf = Shelf(pool, read, visits, room)
        for step in count(start_step):
            epoch, at = divmod(step, steps_per_epoch)
            positions = range(at * clips_per_step, (at + 1) * clips_per_step)
            slots = shelf.take(plan_of(epoch), positions)
            # Reads stand before it in the queue of the threads, so it never waits for a turn.
            ahead.append(pool.submit(_make, make, step, slots))
            if len(ahead) > prefetch:
                yield ahead.popleft().result()
                shelf.give_back(clips_per_step)
    finally:
        pool.shutdown(cancel_futures=True)


def _make(make: Callable[[int, list[C]], B], step: int, slots: Sequence[Slot[C]]) -> B:
    return make(step, [_taken(*slot) for slot in slots])


def _taken(read: Future[list[C | None]], slot: int) -> C:
    """The clip, which the shelf no longer holds."""
    cells = read.result()
    cell, cells[slot] = cells[slot], None
    assert cell is not None
    return cell
