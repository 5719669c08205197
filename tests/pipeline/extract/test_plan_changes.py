"""A corpus that changes under a dataset: retries, redone tasks, and stops right after planning."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import soundfile as sf

from pipeline.dataset.shards import iter_shards
from pipeline.dataset.verify import verify
from pipeline.errors import StorageFault, UserError
from pipeline.songs.plan import Task, append_plan, load_plan
from pipeline.storage.lock import lock
from pipeline.storage.scratch import Scratch
from tests.helpers.songs import tune
from tests.pipeline.conftest import Extract

ONE_TASK = ["plan.task_minutes=10"]


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """Three songs of one speaker; song 1 is empty, so it is quarantined."""
    folder = tmp_path / "corpus" / "ann"
    folder.mkdir(parents=True)
    for number in (0, 2):
        sf.write(folder / f"{number}.wav", tune(3, seed=number), 44100)
    (folder / "1.wav").write_bytes(b"")
    return folder


def mend(songs: Path, number: int = 1) -> None:
    sf.write(songs / f"{number}.wav", tune(4, seed=7), 44100)


def stop_after_planning(patch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr("pipeline.extract.command.run_tasks", interrupted)


def check(dataset: Path, corpus: Path, kept: int) -> None:
    result = verify(dataset, corpus)
    assert result.problems == []
    assert result.account.count("kept") == kept


def test_a_retry_that_is_stopped_after_planning_is_not_planned_twice(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    mend(songs)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            stop_after_planning(patch)
            with pytest.raises(KeyboardInterrupt):
                run_extract(songs.parent, tmp_path / "d", ONE_TASK, retry_quarantined=True)
    run_extract(songs.parent, tmp_path / "d", ONE_TASK, retry_quarantined=True)
    assert len(load_plan(tmp_path / "d")) == 2
    check(tmp_path / "d", songs.parent, kept=3)


def test_retry_and_redo_together_take_a_song_once(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    mend(songs)
    mend(songs, 2)
    both = {"retry_quarantined": True, "redo_changed": True}
    run_extract(songs.parent, tmp_path / "d", ONE_TASK, **both)
    check(tmp_path / "d", songs.parent, kept=3)


def test_a_task_that_is_redone_leaves_out_what_another_took_over(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    mend(songs)
    run_extract(songs.parent, tmp_path / "d", ONE_TASK, retry_quarantined=True)
    mend(songs, 0)
    outcome = run_extract(songs.parent, tmp_path / "d", ONE_TASK, redo_changed=True)
    assert outcome.work.tasks_run == 1
    check(tmp_path / "d", songs.parent, kept=3)


def test_a_song_that_changes_again_during_a_stopped_redo_is_planned_anew(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    mend(songs, 0)
    with pytest.MonkeyPatch.context() as patch:
        stop_after_planning(patch)
        with pytest.raises(KeyboardInterrupt):
            run_extract(songs.parent, tmp_path / "d", ONE_TASK, redo_changed=True)
    sf.write(songs / "0.wav", tune(5, seed=8), 44100)
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    check(tmp_path / "d", songs.parent, kept=2)


def test_a_song_that_is_still_bad_is_retried_and_stays_out(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    for _ in range(2):
        outcome = run_extract(songs.parent, tmp_path / "d", ONE_TASK, retry_quarantined=True)
        assert outcome.account.problems == [] and outcome.account.count("quarantined") == 1


def test_another_split_in_the_manifest_is_remarked_on(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    manifest = songs.parent / "m.csv"
    manifest.write_text("path,speaker,split\nann/0.wav,ann,train\nann/2.wav,ann,train\n")
    run_extract(manifest, tmp_path / "d", ONE_TASK)
    manifest.write_text("path,speaker,split\nann/0.wav,ann,test\nann/2.wav,ann,train\n")
    outcome = run_extract(manifest, tmp_path / "d", ONE_TASK)
    assert any("another split" in notice for notice in outcome.notices)
    assert outcome.work.tasks_run == 0


def test_odd_paths_are_quarantined_and_stop_nobody(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    os.mkfifo(songs / "fifo.wav")
    (songs / "loop").symlink_to(songs / "loop")
    (songs / "zero.wav").symlink_to("/dev/zero")
    odd = [
        "ann/0.wav/x.wav",
        "ann/loop",
        "ann/fifo.wav",
        "ann/zero.wav",
        "ann/",
        f"{'x' * 300}.wav",
    ]
    rows = [f"{path},ann" for path in [*odd, "ann/0.wav", "gone.wav"]]
    manifest = songs.parent / "m.csv"
    manifest.write_text("\n".join(["path,speaker", *rows]))
    outcome = run_extract(manifest, tmp_path / "d", ONE_TASK)
    assert outcome.account.problems == []
    assert outcome.account.count("kept") == 1
    assert outcome.account.reasons("quarantined") == {"missing": 4, "unreadable": 3}


def test_a_mount_that_vanishes_during_the_run_quarantines_nobody(
    songs: Path, tmp_path: Path, run_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is taken away between planning and work, and comes back before the next run."""
    import pipeline.extract.command

    monkeypatch.setattr("pipeline.cluster.run_tasks._STORAGE_WAITS_S", (0.0, 0.0, 0.0))
    run_tasks = pipeline.extract.command.run_tasks
    with pytest.MonkeyPatch.context() as patch:

        def without_the_folder(*arguments: object) -> None:
            songs.rename(tmp_path / "away")
            songs.mkdir()
            run_tasks(*arguments)

        patch.setattr("pipeline.extract.command.run_tasks", without_the_folder)
        with pytest.raises(StorageFault, match="still mounted"):
            run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    songs.rmdir()
    (tmp_path / "away").rename(songs)
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    check(tmp_path / "d", songs.parent, kept=2)


def test_a_shard_of_other_settings_is_not_taken_for_ours(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    run_extract(songs.parent, tmp_path / "other", [*ONE_TASK, "f0.f0_max=400"])
    (shard,) = iter_shards(tmp_path / "d")
    shutil.copy(iter_shards(tmp_path / "other")[0], shard)
    outcome = run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    assert outcome.work.tasks_run == 1
    check(tmp_path / "d", songs.parent, kept=2)


def test_a_lost_shard_is_made_again_without_what_a_later_task_took_over(
    songs: Path, tmp_path: Path, run_extract: Extract
) -> None:
    """The song's file is as it was planned first, so only the plan can tell whose it is."""
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    (before,) = load_plan(tmp_path / "d").values()
    append_plan(tmp_path / "d", [Task(1, "train", before.songs[:1])])
    iter_shards(tmp_path / "d")[0].unlink()
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    assert [len(task.songs) for task in load_plan(tmp_path / "d").values()] == [2, 1]
    check(tmp_path / "d", songs.parent, kept=2)


def test_an_edited_card_is_left_alone(songs: Path, tmp_path: Path, run_extract: Extract) -> None:
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    card = tmp_path / "d" / "README.md"
    first = card.read_text()
    mend(songs, 5)
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    assert card.read_text() != first  # ours, so it is kept up to date
    card.write_text(card.read_text() + "\nLicence: CC0.\n")
    mend(songs, 6)
    run_extract(songs.parent, tmp_path / "d", ONE_TASK)
    assert card.read_text().endswith("\nLicence: CC0.\n")


def test_scratch_folders_of_the_living_stay_and_of_the_dead_go(tmp_path: Path) -> None:
    one, other = Scratch(str(tmp_path)), Scratch(str(tmp_path))
    assert one.folder.is_dir() and other.folder.is_dir()
    dead = one.folder.parent / "dead"
    dead.mkdir()
    (dead / "song.f32").write_bytes(b"1234")
    third = Scratch(str(tmp_path))
    assert not dead.exists() and one.folder.is_dir()
    for scratch in (one, other, third):
        scratch.close()
        assert not scratch.folder.exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("link", "is not a folder"),
        ("dangling", "is not a folder"),
        ("file", "is not a folder"),
        ("open", "is open to other users"),
        ("other", "belongs to another user"),
    ],
)
def test_a_scratch_folder_that_others_may_control_is_refused(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, elsewhere = tmp_path / f"cantor-scratch-{os.getuid()}", tmp_path / "elsewhere"
    (elsewhere / "theirs").mkdir(parents=True)
    if kind in ("link", "dangling"):
        root.symlink_to(elsewhere if kind == "link" else elsewhere / "new")
    elif kind == "file":
        root.touch()
    else:
        root.mkdir()
        root.chmod(0o777 if kind == "open" else 0o700)
    if kind == "other":
        uid = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: uid)
        root.rename(tmp_path / f"cantor-scratch-{uid}")
    with pytest.raises(UserError, match=rf"{words}; remove it, or set workers\.scratch"):
        Scratch(str(tmp_path))
    assert [path.name for path in elsewhere.iterdir()] == ["theirs"]


def test_odd_things_among_scratch_folders_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, elsewhere = Scratch(str(tmp_path)), tmp_path / "elsewhere"
    root = scratch.folder.parent
    (elsewhere / "theirs").mkdir(parents=True)
    (root / "link").symlink_to(elsewhere)
    for name in ("with-link", "with-fifo"):
        (root / name).mkdir()
    (root / "with-link" / ".lock").symlink_to(elsewhere / "new")
    os.mkfifo(root / "with-fifo" / ".lock")
    Scratch(str(tmp_path)).close()
    assert {path.name for path in elsewhere.iterdir()} == {"theirs"}
    assert {path.name for path in root.iterdir()} == {".lock", "link", scratch.folder.name}
    monkeypatch.setattr("pipeline.storage.scratch._LOCK_WAIT_S", 0.0)
    with lock(root), pytest.raises(UserError, match="is in use by process"):
        Scratch(str(tmp_path))
    scratch.close()


def test_a_hundred_thousand_songs_make_a_plan(tmp_path: Path) -> None:
    from pipeline.songs.plan import PlannedSong, append_plan, default_task_minutes, make_tasks

    songs = [
        ("train", PlannedSong(f"s{n % 500}/{n:06d}.wav", f"s{n % 500}", b"p", 1, n, n * 7 % 400))
        for n in range(100_000)
    ]
    minutes = sum(song.duration_s for _, song in songs) / 60
    tasks = make_tasks(songs, default_task_minutes(minutes))
    append_plan(tmp_path, tasks)
    assert load_plan(tmp_path) == {task.index: task for task in tasks}
    assert max(t.duration_s for t in tasks) < 1.05 * min(t.duration_s for t in tasks)
