"""Reading row groups and making batches ahead of their use, in threads, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.batch_order import BatchOrder, Indices

A = TypeVar("A")
C = TypeVar("C")  # a clip as it is read
B = TypeVar("B")  # a batch


def read_ahead(
    read: Callable[[A], B], items: Iterable[A], ahead: int = 1
) -> Generator[B, None, None]:
    """Yield `read(item)` of each item in order; a thread reads up to `ahead` of them early.

    An exception of the thread is raised here. Closing the generator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
    try:
        yield from _run_ahead(pool, (partial(read, item) for item in items), ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def stream(
    order: BatchOrder,
    read: Callable[[int, Indices], list[C | None]],
    make: Callable[[int, Indices, list[C]], B],
    *,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    threads: int,
    prefetch: int,
) -> Generator[B, None, None]:
    """Yield the batch of each step from `start_step` on, without end.

    read(group, clips): clips of a row group, in that order, a list that the caller may change.
    make(step, clips, cells): a batch. clips: all of the step; cells: what was read of worker
    `rank`'s share, the clips rank, rank + world_size, ...
    A worker holds its part of the clips of `order.shuffle_groups` row groups, or, where that is
    less, those of the next `prefetch` steps.

    An exception of a thread is raised here. Closing the generator ends the threads.
    """
    steps, share = order.steps_per_epoch, order.batch_size // world_size
    batches = lru_cache(3)(order.epoch)

    @lru_cache(3)
    def plan(epoch: int) -> EpochPlan:
        passed = max(0, start_step - epoch * steps)
        again = np.arange(steps * order.batch_size).reshape(steps, -1) >= len(order)
        mine = np.s_[passed:, rank::world_size]
        clips = batches(epoch)[mine].ravel()
        return plan_epoch(epoch, clips, order.group[clips], again[mine].ravel(), passed * share)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    visits = (visit for epoch in count(start_step // steps) for visit in plan(epoch).visits)
    shelf = Shelf(pool, read, visits, -(-order.most_clips // world_size))

    def calls() -> Iterator[Callable[[], B]]:
        for step in count(start_step):
            epoch, at = divmod(step, steps)
            slots = shelf.take(plan(epoch), range(at * share, (at + 1) * share))
            yield partial(_make, make, step, batches(epoch)[at], slots)

    try:
        # Reads stand before the batch in the queue of the threads, so it never waits for a turn.
        made = _run_ahead(pool, calls(), prefetch)
        while True:
            yield next(made)
            shelf.give_back(share)
    finally:
        pool.shutdown(cancel_futures=True)


def _run_ahead(
    pool: ThreadPoolExecutor, calls: Iterable[Callable[[], B]], ahead: int
) -> Iterator[B]:
    """Yield the results of calls in order, `ahead` of them submitted before they are needed."""
    pending: deque[Future[B]] = deque()
    for call in calls:
        pending.append(pool.submit(call))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _make(
    make: Callable[[int, Indices, list[C]], B], step: int, clips: Indices, slots: Sequence[Slot[C]]
) -> B:
    return make(step, clips, [_take(*slot) for slot in slots])


def _take(read: Future[list[C | None]], slot: int) -> C:
    """Return a clip that was read, and drop it from the list."""
    cells = read.result()
    cell, cells[slot] = cells[slot], None
    assert cell is not None
    return cell


@dataclass(frozen=True)
class Visit:
    """One reading of a row group, for some clips of an epoch."""

    epoch: int
    group: int
    clips: Indices = field(compare=False)  # in the order of their use; a clip may come twice
    first_use: int  # position in the epoch; no two visits of an epoch have the same


@dataclass(frozen=True)
class EpochPlan:
    """The visits of an epoch in the order of their first use, and the clip of each position."""

    visits: list[Visit]
    visit_at: Indices  # (P,) place in visits
    slot_at: Indices  # (P,) place in the clips of the visit
    first: int  # the position of the epoch that these start from

    def place(self, position: int) -> tuple[Visit, int]:
        """Return the visit that reads the clip of this position, and its place there."""
        at = position - self.first
        return self.visits[self.visit_at[at]], int(self.slot_at[at])


def plan_epoch(
    epoch: int,
    clips: Indices,
    groups: NDArray[np.int32],
    again: NDArray[np.bool_],
    first: int = 0,
) -> EpochPlan:
    """Plan one visit for each row group, and one more for its clips that come again at the end.

    clips, groups, again: (P,) for each position of the epoch from `first` on: the clip, its row
    group, and whether it comes for a second time.
    """
    _, first_use, visit_at = np.unique(
        groups.astype(np.int64) * 2 + again, return_index=True, return_inverse=True
    )
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
        read: Callable[[int, Indices], list[C | None]],
        visits: Iterator[Visit],
        room: int,
    ) -> None:
        self._pool, self._read, self._visits = pool, read, visits
        self._next = next(visits)
        self._room = room  # clips
        self._reads: dict[Visit, _Read[C]] = {}

    def take(self, plan: EpochPlan, positions: range) -> list[Slot[C]]:
        """Start reading the clips at `positions`, and return where they will be."""
        epoch = plan.visits[0].epoch
        while self._is_due(epoch, positions.stop) or self._has_room(epoch):
            cells = self._pool.submit(self._read, self._next.group, self._next.clips)
            self._reads[self._next] = _Read(cells, len(self._next.clips))
            self._room -= len(self._next.clips)
            self._next = next(self._visits)
        return [self._slot(*plan.place(position)) for position in positions]

    def give_back(self, clips: int) -> None:
        """Free the room of used clips."""
        self._room += clips

    def _is_due(self, epoch: int, stop: int) -> bool:
        return (self._next.epoch, self._next.first_use) < (epoch, stop)

    def _has_room(self, epoch: int) -> bool:
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
