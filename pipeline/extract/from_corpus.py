"""The songs of a corpus as the input of an extraction.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from pipeline.dataset.shards import Footer
from pipeline.errors import first_names
from pipeline.extract.config import ExtractConfig
from pipeline.extract.job import TakenOver
from pipeline.extract.plan_changes import Changes, PlanUpdate, find_changes
from pipeline.songs.corpus import Corpus, list_corpus, named_as_planned
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
        speakers = Counter(source.speaker for source in corpus.songs)
        lines = [f"corpus   {len(corpus.songs)} songs of {len(speakers)} speakers at {corpus.root}"]
        unreadable = [s.song_id for task in added for s in task.songs if s.duration_s == 0]
        if unreadable:
            lines.append(
                f"trouble  {len(unreadable)} without a readable header ({first_names(unreadable)})"
            )
        return PlanUpdate(added, changes.gone, changes.notices, lines)

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
