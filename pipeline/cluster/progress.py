"""Progress of a run: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.songs.balance import QUARANTINED

_LOG_EVERY_S = 30.0
_QUIET_S = 600.0
_SILENT_S = 60.0  # busy machines take longer than a few seconds to answer


@dataclass(frozen=True)
class Snapshot:
    """Progress so far. songs: finished ones. audio_s: by the headers' durations."""

    songs: int = 0
    audio_s: float = 0.0
    quarantined: int = 0
    last_song: str = ""


class Board:
    """A count of songs. A song that is reported again (by a retried task) counts once."""

    def __init__(self) -> None:
        self._songs: dict[str, tuple[float, str | None]] = {}
        self._last = ""

    def record(self, song_id: str, seconds: float, status: str | None) -> None:
        """Note that so many seconds of a song are done. status: None until all of it is."""
        self._songs[song_id] = (seconds, status)
        if status is not None:
            self._last = song_id

    def snapshot(self) -> Snapshot:
        songs = list(self._songs.values())
        finished = [status for _, status in songs if status is not None]
        seconds = sum(seconds for seconds, _ in songs)
        return Snapshot(len(finished), seconds, finished.count(QUARANTINED), self._last)


class ProgressDisplay:
    """Context manager that shows `read()` once a second until it exits.

    read: returns the current Snapshot, or None when it is not available just now.
    """

    def __init__(
        self, console: Console, total_audio_s: float, read: Callable[[], Snapshot | None]
    ) -> None:
        self.console = console
        self.total_s = total_audio_s
        self.read = read
        self._stop = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if self.console.is_terminal:
            self._show_bar()
        else:
            self._write_lines()

    def _show_bar(self) -> None:
        columns = (BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            row = bar.add_task("starting workers", total=max(self.total_s, 1e-9))
            for snapshot in self._snapshots(every_s=1.0):
                bar.update(row, completed=snapshot.audio_s, description=self._words(snapshot))

    def _write_lines(self) -> None:
        due = 0.0
        for snapshot in self._snapshots(every_s=1.0):
            if time.monotonic() >= due:
                self.console.print(self._words(snapshot), highlight=False, soft_wrap=True)
                due = time.monotonic() + _LOG_EVERY_S

    def _snapshots(self, every_s: float) -> Iterator[Snapshot]:
        latest, changed, warned = Snapshot(), time.monotonic(), False
        answered, silent = time.monotonic(), False
        while not self._stop.wait(every_s):
            answer = self.read()
            if answer is not None:
                if silent:
                    self.console.print("Ray answers again.")
                answered, silent = time.monotonic(), False
            elif not silent and time.monotonic() - answered >= _SILENT_S:
                silent = True
                self.console.print(
                    f"Ray has not answered for {_SILENT_S:.0f} s. The machine may be busy. If Ray "
                    "was killed, this program ends within a minute; committed work is safe, and "
                    "the same command resumes."
                )
            snapshot = answer or latest
            if snapshot != latest:
                latest, changed, warned = snapshot, time.monotonic(), False
            elif not warned and time.monotonic() - changed > _QUIET_S:
                warned = True
                self.console.print(
                    f"No song finished for {_QUIET_S / 60:.0f} minutes (the last was "
                    f"{latest.last_song or 'none'}). This can be normal for long songs, or when "
                    "networks run on a CPU."
                )
            yield latest

    def _words(self, snapshot: Snapshot) -> str:
        elapsed = max(1e-9, time.monotonic() - self._start)
        rate = snapshot.audio_s / elapsed
        left = (self.total_s - snapshot.audio_s) / rate if rate > 0 else 0.0
        eta = f"ETA {_clock(left)}" if rate > 0 else "ETA ?"
        if 0 < self.total_s <= snapshot.audio_s + 1e-3:  # networks, and writing, come after songs
            eta = "finishing the last clips"
        return (
            f"{snapshot.audio_s / 3600:.2f} of {self.total_s / 3600:.2f} h  "
            f"{rate:.1f}x real time  {eta}  {snapshot.songs} songs  "
            f"{snapshot.quarantined} quarantined"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
