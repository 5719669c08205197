"""The order of a resumable run, on one that copies letters: a list of files, each made once."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.cluster.resumable_run import TaskPlan, complete, preview, with_added
from pipeline.errors import UserError
from pipeline.songs.plan import PlannedSong, Task
from pipeline.storage.atomic import sweep, write_info
from pipeline.storage.lock import lock


@dataclass
class Letters:
    """Writes a file for each letter of `text` that has none yet."""

    folder: Path
    text: str
    stop_at: str = ""
    steps: list[str] = field(default_factory=list)

    def list_inputs(self) -> None:
        self.steps.append("list")
        if not self.text:
            raise UserError("there are no letters")

    def check_settings(self) -> None:
        self.steps.append("check")
        settings = self.folder / "settings"
        if settings.exists() and settings.read_text() != self.text:
            raise UserError("other letters")

    def plan(self) -> list[str]:
        self.steps.append("plan")
        return [letter for letter in self.text if not (self.folder / letter).exists()]

    def begin(self, plan: list[str]) -> None:
        self.steps.append("begin")
        (self.folder / "settings").write_text(self.text)

    def run(self, plan: list[str]) -> None:
        for letter in plan:
            if letter == self.stop_at:
                raise KeyboardInterrupt
            self.steps.append(letter)
            (self.folder / letter).touch()

    def balance(self, plan: list[str]) -> int:
        self.steps.append("balance")
        return sum((self.folder / letter).exists() for letter in self.text)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Letters(tmp_path / "d", "abc", stop_at="b")
    with pytest.raises(KeyboardInterrupt):
        complete(first)
    assert first.steps == ["list", "check", "plan", "begin", "a"]
    second = Letters(tmp_path / "d", "abc")
    assert complete(second) == 3
    assert second.steps == ["list", "check", "plan", "begin", "b", "c", "balance"]
    third = Letters(tmp_path / "d", "abc")
    assert complete(third) == 3
    assert third.steps == ["list", "check", "plan", "begin", "balance"]


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no letters"):
        complete(Letters(tmp_path / "none", ""))
    assert not (tmp_path / "none").exists()
    complete(Letters(tmp_path / "d", "ab"))
    (tmp_path / "d" / ".tmp").mkdir()
    (tmp_path / "d" / ".tmp" / "half").touch()
    before = files(tmp_path / "d")
    with pytest.raises(UserError, match="other letters"):
        complete(Letters(tmp_path / "d", "xy"))
    assert files(tmp_path / "d") == before and (tmp_path / "d" / ".tmp" / "half").exists()
    complete(Letters(tmp_path / "d", "ab"))
    assert not (tmp_path / "d" / ".tmp" / "half").exists()  # swept once nothing is refused


def test_a_preview_writes_nothing(tmp_path: Path) -> None:
    run = Letters(tmp_path / "d", "ab")
    assert preview(run) == ["a", "b"]
    assert run.steps == ["list", "check", "plan"]
    assert not (tmp_path / "d").exists()


def test_the_folder_is_locked_while_a_run_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lock._LOCK_WAIT_S", 0.0)
    run = Letters(tmp_path / "d", "ab")
    with lock(tmp_path / "d"), pytest.raises(UserError, match="is in use by process"):
        complete(run)
    assert run.steps == ["list"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of somebody else, with a file that would be truncated or removed."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "socket", "hard link"])
def test_a_lock_that_is_no_plain_file_of_ours_is_refused_at_once(
    kind: str, tmp_path: Path, elsewhere: Path
) -> None:
    path = tmp_path / "d" / ".lock"
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(elsewhere / "precious")
    elif kind == "dangling":
        path.symlink_to(elsewhere / "new")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        path.hardlink_to(elsewhere / "precious")
    run = Letters(tmp_path / "d", "ab")
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"/d/\.lock is not a plain file of this program; remove"):
        complete(run)
    assert time.monotonic() - begun < 1.0
    assert files(elsewhere) == {"precious"} and run.steps == ["list"]
    assert (elsewhere / "precious").read_text() == "precious"


def test_a_lock_of_another_program_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".lock").write_text("4711\n")
    with pytest.raises(UserError, match=r"/\.lock is of another program; name another folder"):
        complete(Letters(tmp_path / "d", "ab"))
    assert (tmp_path / "d" / ".lock").read_text() == "4711\n"
    (tmp_path / "d" / ".lock").write_text("process 42 on a-machine-that-died")
    complete(Letters(tmp_path / "d", "ab"))


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_for_half_written_files_that_is_a_link_is_refused(
    kind: str, tmp_path: Path, elsewhere: Path
) -> None:
    (tmp_path / "d").mkdir()
    if kind == "link":
        (tmp_path / "d" / ".tmp").symlink_to(elsewhere)
    else:
        (tmp_path / "d" / ".tmp").touch()
    for act in (sweep, lambda folder: write_info(folder, "x.json", {})):
        with pytest.raises(UserError, match=r"/\.tmp is not a folder of this program; remove it"):
            act(tmp_path / "d")
    assert files(elsewhere) == {"precious"}


def test_missing_tasks_are_those_that_left_nothing() -> None:
    def task(index: int, minutes: float = 1.0) -> Task:
        song = PlannedSong(f"ann/{index}.wav", "ann", b"x", 1, 1, 60 * minutes)
        return Task(index, "train", (song,))

    tasks = with_added({0: task(0), 2: task(2)}, [task(3), task(0, minutes=6.0)])
    assert list(tasks) == [0, 2, 3] and tasks[0].duration_s == 360
    plan = TaskPlan(tasks, [], {2: "done"}, frozenset(), None)
    assert list(plan.missing) == [0, 3]
    assert plan.missing_hours == pytest.approx(7 / 60)
