"""The songs of a corpus as the input of an extraction.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from pipeline.dataset.shards import Footer
from pipeline.errors import first_names, printable
from pipeline.extract.config import ExtractConfig
from pipeline.extract.job import TakenOver
from pipeline.extract.plan_changes import Changes, PlanUpdate, find_changes
from pipeline.reports.command_summary import first_lines
from pipeline.songs.corpus import Corpus, ListedSong, list_corpus, named_as_planned, song_id_of
from pipeline.songs.plan import Task, default_task_minutes, make_tasks, plan_songs


class FromCorpus:
    """A corpus that is extracted.

    speaker: name of the speaker of every song, whatever folder it lies in.
    retry_quarantined, redo_changed: plan such songs again.
    """

    def __init__(
        self,
        path: Path,
        config: ExtractConfig,
        console: Console,
        speaker: str | None = None,
        retry_quarantined: bool = False,
        redo_changed: bool = False,
    ) -> None:
        self.path = path
        self.config = config
        self.console = console
        self.speaker = speaker
        self.retry_quarantined = retry_quarantined
        self.redo_changed = redo_changed

    def list_songs(self) -> None:
        """List the corpus. Raises: UserError: when there is none."""
        self.corpus = list_corpus(self.path, self.speaker)

    @property
    def root(self) -> Path:
        return self.corpus.root

    def update_plan(self, tasks: Mapping[int, Task], committed: Mapping[int, Footer]) -> PlanUpdate:
        """Return tasks for songs that are new, changed or retried. Reads their headers."""
        planned = (song.song_id for task in tasks.values() for song in task.songs)
        corpus = named_as_planned(self.corpus, planned)
        changes = find_changes(corpus, tasks, committed, self.retry_quarantined, self.redo_changed)
        added = self._plan_changes(corpus, tasks, changes)
        lines = _describe(corpus, {**tasks, **{task.index: task for task in added}})
        notices = list(changes.notices)
        if self.speaker is None and self.path.is_dir() and changes.add:
            notices += _too_high(corpus)
        unreadable = [s.song_id for task in added for s in task.songs if s.duration_s == 0]
        if unreadable:
            lines.append(
                f"trouble  {len(unreadable)} without a readable header ({first_names(unreadable)})"
            )
        return PlanUpdate(added, changes.gone, notices, lines)

    def take_over(self) -> TakenOver | None:
        """Return None: every column is made."""
        return None

    def _plan_changes(
        self, corpus: Corpus, tasks: Mapping[int, Task], changes: Changes
    ) -> list[Task]:
        """Return the renewed tasks, under their old index, and the new ones."""
        song_ids = changes.songs
        if not song_ids:
            return []
        self.console.print(f"planning {len(song_ids)} songs", highlight=False)
        sources = [source for source in corpus.songs if source.song_id in song_ids]
        songs = plan_songs(corpus, sources, self.config.decode, self.config.workers.scratch)
        renewed = [
            Task(index, tasks[index].split, tuple(songs.get(s.song_id, ("", s))[1] for s in kept))
            for index, kept in changes.renew.items()
        ]
        added = [songs[source.song_id] for source in changes.add]
        before = sum(task.duration_s for task in tasks.values())
        minutes = (before + sum(song.duration_s for _, song in added)) / 60
        size = self.config.plan.task_minutes or default_task_minutes(minutes)
        return renewed + make_tasks(added, size, max(tasks, default=-1) + 1)


def _describe(corpus: Corpus, tasks: Mapping[int, Task]) -> list[str]:
    """Return lines on the corpus and, as a table, on each speaker."""
    seconds = {song.song_id: song.duration_s for task in tasks.values() for song in task.songs}
    songs: dict[str, list[ListedSong]] = defaultdict(list)
    for song in corpus.songs:
        songs[song.speaker].append(song)
    rows = [("speaker", "songs", "hours", "first path")]
    for speaker, own in sorted(songs.items()):
        hours = sum(seconds[song.song_id] for song in own) / 3600
        first = os.fsdecode(own[0].path)
        rows.append((printable(speaker), str(len(own)), f"{hours:.2f}", printable(first)))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        f"  {row[0].ljust(wide[0])}  {row[1].rjust(wide[1])}  {row[2].rjust(wide[2])}  {row[3]}"
        for row in rows
    ]
    total = f"corpus   {len(corpus.songs)} songs of {len(songs)} speakers at {corpus.root}"
    return [total, *first_lines(table, "a manifest names them all")]


def _too_high(corpus: Corpus) -> list[str]:
    """Return a note when every song lies deeper than SPEAKER/: CORPUS may be a folder too high."""
    folders = [song.path.split(b"/")[:-1] for song in corpus.songs]
    if any(len(parts) < 2 for parts in folders):
        return []
    tops, inner = ({song_id_of(parts[depth]) for parts in folders} for depth in (0, 1))
    words = (
        f"no song lies directly in the folder of its speaker: the speakers are "
        f"{first_names(sorted(tops))}, and their songs lie in folders such as "
        f"{first_names(sorted(inner))}. If those are the speakers, "
    )
    if len(tops) == 1:
        return [f"{words}give {corpus.root / tops.pop()} as CORPUS"]
    return [f"{words}name the songs and speakers in a manifest"]
