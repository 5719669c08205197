from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from pipeline.cluster.progress import Board, ProgressDisplay, Snapshot


@pytest.mark.parametrize(
    ("snapshot", "words"),
    [
        (Snapshot(), "ETA ?  0 songs"),
        (Snapshot(1, 3600.0), "ETA 0:00:"),
        (Snapshot(2, 7200.0), "finishing the last clips  2 songs"),
    ],
)
def test_a_line_tells_how_far_it_is(snapshot: Snapshot, words: str) -> None:
    written = io.StringIO()
    seen = threading.Event()

    def read() -> Snapshot | None:
        if written.getvalue():
            seen.set()
        return snapshot

    with ProgressDisplay(Console(file=written), 7200.0, read):
        assert seen.wait(30)
    assert words in written.getvalue()


def test_silence_of_ray_is_said_after_a_minute_and_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.cluster.progress.time.monotonic", lambda: now)
    written = io.StringIO()
    answers: list[Snapshot | None] = [None]
    display = ProgressDisplay(Console(file=written, width=300), 7200.0, lambda: answers[0])
    snapshots = display._snapshots(0.0)
    said = []
    for now, answer in (  # noqa: B007  the clock above reads it
        (0.0, Snapshot()),
        (10.0, None),
        (59.0, None),
        (60.0, None),
        (90.0, None),
        (91.0, Snapshot()),
        (150.0, None),
        (151.0, None),
    ):
        answers[0] = answer
        next(snapshots)
        said.append([line[:14] for line in written.getvalue().splitlines()])
    silence, back = "Ray has not an", "Ray answers ag"
    assert said == [[]] * 3 + [[silence]] * 2 + [[silence, back]] * 2 + [[silence, back, silence]]
    assert "not answered for 60 s" in written.getvalue()


def test_a_song_under_way_counts_by_its_seconds_and_once() -> None:
    board = Board()
    board.record("a", 10.0, None)
    board.record("b", 5.0, None)
    board.record("a", 20.0, "converted")
    assert board.snapshot() == Snapshot(1, 25.0, 0, "a")
    board.record("b", 1.0, None)  # its worker died, and another one begins
    board.record("b", 30.0, "quarantined")
    assert board.snapshot() == Snapshot(2, 50.0, 1, "b")
