"""Faults of a song end as an entry in the ledger; those of the storage and of ours do not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset.schema import AUDIO_SCHEMA
from pipeline.extract.clip_sources import ClipsOfSongs, SongClips
from pipeline.extract.config import load_config
from pipeline.extract.job import ExtractJob
from pipeline.songs.plan import Task, load_plan
from stages.chain import StageClock
from tests.pipeline.conftest import FAST


@pytest.fixture
def source(dataset: Path, writable_corpus: Path) -> Iterator[ClipsOfSongs]:
    source = ClipsOfSongs(ExtractJob(dataset, writable_corpus, load_config(None, FAST), "", {}))
    yield source
    source.close()


@pytest.fixture
def task(dataset: Path) -> Task:
    """The task of a song that is kept."""
    tasks = load_plan(dataset).values()
    return next(task for task in tasks if task.songs[0].song_id == "spk1/song0.wav")


def read(source: ClipsOfSongs, task: Task, *crashed: str) -> SongClips:
    return next(source.read(task, task.songs[:1], crashed, StageClock()))


def refused(song: SongClips) -> tuple[str | None, bool]:
    """The reason, and whether the file was hashed."""
    assert song.entry.status == "quarantined"
    assert song.clips.num_rows == 0 and song.clips.schema.equals(AUDIO_SCHEMA)
    return song.entry.reason, song.entry.sha256 is not None


def test_a_song_gives_its_clips_and_its_entry(source: ClipsOfSongs, task: Task) -> None:
    song = read(source, task)
    assert (song.entry.status, song.origin) == ("kept", None)
    assert song.clips.num_rows == song.entry.clips > 0
    assert song.clips.schema.equals(AUDIO_SCHEMA)


def test_faults_of_a_song_quarantine_it(
    source: ClipsOfSongs, task: Task, writable_corpus: Path
) -> None:
    path = writable_corpus / "spk1" / "song0.wav"
    assert refused(read(source, task, "spk1/song0.wav")) == ("crashed", True)
    path.write_bytes(path.read_bytes() + b"more")
    assert refused(read(source, task)) == ("changed_since_planned", False)
    path.unlink()
    assert refused(read(source, task)) == ("missing", False)


def test_a_folder_that_is_gone_is_a_fault_of_the_storage(
    source: ClipsOfSongs, task: Task, writable_corpus: Path
) -> None:
    shutil.rmtree(writable_corpus / "spk1")
    with pytest.raises(FileNotFoundError, match="still mounted") as raised:
        read(source, task)
    assert raised.value.__notes__ == ["while working on spk1/song0.wav"]


def test_a_bug_names_the_song(
    source: ClipsOfSongs, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.chain.measure_quality", lambda wav, rate: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        read(source, task)
    assert raised.value.__notes__ == ["while working on spk1/song0.wav"]
