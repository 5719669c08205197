from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from pipeline.progress import ProgressDisplay, Snapshot


@pytest.mark.parametrize(
    ("snapshot", "words"),
    [
        (Snapshot(), "ETA ?  0 songs"),
        (Snapshot(1, 3600.0), "ETA 0:00:"),
        (Snapshot(2, 7200.0), "the last clips are under way  2 songs"),
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
