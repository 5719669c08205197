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


def test_a_song_under_way_counts_by_its_seconds_and_once() -> None:
    board = Board()
    board.record("a", 10.0, None)
    board.record("b", 5.0, None)
    board.record("a", 20.0, "converted")
    assert board.snapshot() == Snapshot(1, 25.0, 0, "a")
    board.record("b", 1.0, None)  # its worker died, and another one begins
    board.record("b", 30.0, "quarantined")
    assert board.snapshot() == Snapshot(2, 50.0, 1, "b")
