from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.songs.plan import (
    PlannedSong,
    append_plan,
    default_task_minutes,
    load_plan,
    make_tasks,
)


def song(number: int, seconds: float) -> PlannedSong:
    return PlannedSong(f"ann/{number:05d}.wav", "ann", b"p%d" % number, 10, number, seconds)


songs = st.lists(st.floats(0, 3600), min_size=1, max_size=60).map(
    lambda lengths: [("train", song(n, s)) for n, s in enumerate(lengths)]
)


@given(songs, st.floats(0.1, 60), st.randoms(use_true_random=False))
def test_a_plan_covers_every_song_once_whatever_the_order(
    pairs: list[tuple[str, PlannedSong]], minutes: float, rng: random.Random
) -> None:
    tasks = make_tasks(pairs, minutes)
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    assert make_tasks(shuffled, minutes) == tasks
    planned = [s.song_id for task in tasks for s in task.songs]
    assert sorted(planned) == sorted(s.song_id for _, s in pairs)
    assert [task.index for task in tasks] == list(range(len(tasks)))


@given(songs, st.floats(0.1, 60))
def test_tasks_are_balanced_and_longest_first(
    pairs: list[tuple[str, PlannedSong]], minutes: float
) -> None:
    tasks = make_tasks(pairs, minutes)
    loads = [sum(s.duration_s + 1.0 for s in task.songs) for task in tasks]
    assert loads == sorted(loads, reverse=True)
    # Longest-processing-time rule: no task exceeds the mean by more than the longest song.
    longest = max(s.duration_s for _, s in pairs) + 1.0
    assert max(loads) <= sum(loads) / len(loads) + longest + 1e-6


def test_splits_never_share_a_task() -> None:
    pairs = [("train" if n % 3 else "validation", song(n, 10.0)) for n in range(30)]
    tasks = make_tasks(pairs, 1.0)
    assert {task.split for task in tasks} == {"train", "validation"}
    names = {s.song_id: split for split, s in pairs}
    assert all(names[s.song_id] == task.split for task in tasks for s in task.songs)
    assert tasks[0].shard_name in {"train-00000.parquet", "validation-00000.parquet"}


def test_default_task_size_depends_on_the_minutes_alone() -> None:
    assert default_task_minutes(3) == 1.0
    assert default_task_minutes(640) == 10.0
    assert default_task_minutes(60_000) == 20.0


def test_a_plan_is_append_only_and_later_rows_replace_a_task(tmp_path: Path) -> None:
    first = make_tasks([("train", song(n, 60.0)) for n in range(4)], 1.0)
    append_plan(tmp_path, first)
    assert load_plan(tmp_path) == {task.index: task for task in first}
    more = make_tasks([("train", song(9, 30.0))], 1.0, first_index=len(first))
    changed = first[1].songs[0]
    renewed = type(first[1])(1, "train", (type(changed)(*_with_size(changed, 11)),))
    append_plan(tmp_path, [renewed, *more])
    plan = load_plan(tmp_path)
    assert list(plan) == list(range(len(first) + 1))
    assert plan[1] == renewed
    assert plan[1].task_id != first[1].task_id
    assert plan[0].task_id == first[0].task_id


def _with_size(planned: PlannedSong, size: int) -> tuple[object, ...]:
    p = planned
    return (p.song_id, p.speaker, p.path, size, p.mtime_ns, p.duration_s)
