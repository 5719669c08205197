"""What a corpus asks of an existing plan: songs to add, songs to take up again, tasks to redo.

A song belongs to the last task that names it; its entry in an earlier one is history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.dataset.shards import Footer
from pipeline.errors import first_names
from pipeline.songs.balance import QUARANTINED
from pipeline.songs.corpus import Corpus, ListedSong, left_alone
from pipeline.songs.plan import PlannedSong, Task


@dataclass(frozen=True)
class Changes:
    """add: songs that get new tasks. renew: tasks to plan again in place, with the songs they keep.

    gone: songs of the plan that the corpus has no longer. notices: what the user should know.
    """

    add: list[ListedSong] = field(default_factory=list)
    renew: dict[int, list[PlannedSong]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)

    @property
    def songs(self) -> set[str]:
        """Ids of all songs that are planned anew."""
        kept = (song.song_id for songs in self.renew.values() for song in songs)
        return {*kept, *(source.song_id for source in self.add)}


@dataclass(frozen=True)
class Asked:
    """What a corpus, or a dataset that is taken over, asks of the plan.

    tasks: new ones, and those to be planned again under their old index. gone: songs of the plan
    that are not there now. lines: for `--dry-run`. stale: tasks whose shards are to be redone.
    """

    tasks: list[Task]
    gone: frozenset[str]
    notices: list[str]
    lines: list[str]
    stale: frozenset[int] = frozenset()


def find_changes(
    corpus: Corpus,
    tasks: Mapping[int, Task],
    held: Mapping[int, Footer],
    retry_quarantined: bool = False,
    redo_changed: bool = False,
) -> Changes:
    """Compare the corpus with the plan.

    held: footers of the committed shards that still are what the plan asks for. A song of a task
    that is not committed is simply planned anew when it changed; one that is committed only with
    `redo_changed`, together with its whole task.
    """
    listed = {source.song_id: source for source in corpus.songs}
    owner: dict[str, Task] = {}
    planned: dict[str, PlannedSong] = {}
    for _, task in sorted(tasks.items()):
        for song in task.songs:
            owner[song.song_id], planned[song.song_id] = task, song

    retry = _quarantined(owner, held) & set(listed) if retry_quarantined else set()
    committed, pending = [], []  # changed songs
    for song_id in set(planned) & set(listed) - retry:
        now, then = listed[song_id], planned[song_id]
        differs = (now.size, now.mtime_ns, now.speaker) != (then.size, then.mtime_ns, then.speaker)
        if owner[song_id].index in held:
            committed += [song_id] if differs else []
        else:
            pending += [song_id] if differs or now.path != then.path else []
    stale = pending + (committed if redo_changed else [])
    # A lost shard is made again without the songs that a later task took over meanwhile.
    stale += [
        song_id
        for song_id, task in owner.items()
        if task.index not in held and any(owner[s.song_id] is not task for s in task.songs)
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
    left = [] if redo_changed else sorted(committed)
    notices = _notices(corpus, owner, listed, left, gone)
    return Changes(add, renew, gone, notices)


def _quarantined(owner: Mapping[str, Task], held: Mapping[int, Footer]) -> set[str]:
    return {
        entry.song_id
        for index, footer in held.items()
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
            "--redo-changed does their tasks again"
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
    return notices + left_alone(corpus)
