"""Changes of a corpus since it was planned: songs to add, songs to retry, tasks to redo.

A song belongs to the last task that names it; its entry in an earlier one is history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.dataset.shards import Footer
from pipeline.errors import first_names
from pipeline.songs.balance import QUARANTINED
from pipeline.songs.corpus import Corpus, ListedSong, not_listed
from pipeline.songs.plan import PlannedSong, Task


@dataclass(frozen=True)
class Changes:
    """Changes of a corpus against its plan.

    add: songs that get new tasks. renew: tasks to plan again in place, with the songs they keep.
    gone: planned songs that are no longer in the corpus. notices: remarks for the user.
    """

    add: list[ListedSong] = field(default_factory=list)
    renew: dict[int, list[PlannedSong]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)

    @property
    def songs(self) -> set[str]:
        """Ids of all songs that are planned again."""
        kept = (song.song_id for songs in self.renew.values() for song in songs)
        return {*kept, *(source.song_id for source in self.add)}


@dataclass(frozen=True)
class PlanUpdate:
    """Tasks that the input of an extraction adds to the plan.

    added: new tasks, and tasks planned again under their old index. gone: planned songs that are
    not there now. notices: remarks for the user. lines: a description of the input for --dry-run.
    stale: committed tasks that are to be redone.
    """

    added: list[Task]
    gone: frozenset[str]
    notices: list[str]
    lines: list[str]
    stale: frozenset[int] = frozenset()


def find_changes(
    corpus: Corpus,
    tasks: Mapping[int, Task],
    committed: Mapping[int, Footer],
    retry_quarantined: bool = False,
    redo_changed: bool = False,
) -> Changes:
    """Compare the corpus with the plan.

    committed: footers of the shards that match the plan. When a song changed, a task that is not
    committed is planned again; a committed one only with `redo_changed`, all of it.
    """
    listed = {source.song_id: source for source in corpus.songs}
    owner: dict[str, Task] = {}
    planned: dict[str, PlannedSong] = {}
    for _, task in sorted(tasks.items()):
        for song in task.songs:
            owner[song.song_id], planned[song.song_id] = task, song

    retry = _quarantined(owner, committed) & set(listed) if retry_quarantined else set()
    changed_committed, changed_pending = [], []
    for song_id in set(planned) & set(listed) - retry:
        now, then = listed[song_id], planned[song_id]
        differs = (now.size, now.mtime_ns, now.speaker) != (then.size, then.mtime_ns, then.speaker)
        if owner[song_id].index in committed:
            changed_committed += [song_id] if differs else []
        else:
            changed_pending += [song_id] if differs or now.path != then.path else []
    stale = changed_pending + (changed_committed if redo_changed else [])
    # A lost shard is made again without the songs that a later task took over meanwhile.
    stale += [
        song_id
        for song_id, task in owner.items()
        if task.index not in committed and any(owner[s.song_id] is not task for s in task.songs)
    ]
    renew = {
        index: [
            song
            for song in tasks[index].songs
            if owner[song.song_id].index == index and song.song_id not in retry
        ]
        for index in sorted({owner[song_id].index for song_id in stale})
    }
    add = [s for s in corpus.songs if s.song_id not in planned or s.song_id in retry]
    gone = frozenset(planned) - frozenset(listed)
    kept_as_they_are = [] if redo_changed else sorted(changed_committed)
    notices = _notices(corpus, owner, listed, kept_as_they_are, gone)
    return Changes(add, renew, gone, notices)


def _quarantined(owner: Mapping[str, Task], committed: Mapping[int, Footer]) -> set[str]:
    return {
        entry.song_id
        for index, footer in committed.items()
        for entry in footer.ledger
        if entry.status == QUARANTINED and owner[entry.song_id].index == index
    }


def _notices(
    corpus: Corpus,
    owner: Mapping[str, Task],
    listed: Mapping[str, ListedSong],
    changed: list[str],
    gone: frozenset[str],
) -> list[str]:
    notices = []
    if changed:
        notices.append(
            f"{len(changed)} songs changed after they were extracted ({first_names(changed)}); "
            "pass --redo-changed to extract their tasks again"
        )
    moved = [s for s, task in owner.items() if s in listed and listed[s].split != task.split]
    if moved:
        notices.append(
            f"{len(moved)} songs have another split in the manifest than in the plan "
            f"({first_names(moved)}); the split of a planned song stays"
        )
    if gone:
        names = first_names(sorted(gone))
        notices.append(f"{len(gone)} planned songs are not in the corpus now ({names})")
    return notices + not_listed(corpus)
