"""Scratch folders for decoded audio.

Tested by tests/pipeline/extract/test_plan_changes.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.lock import lock, open_lock, take_lock

_LOCK_WAIT_S = 60.0  # another process may be removing much


class Scratch:
    """A scratch folder for decoded PCM. Making one removes those of dead processes.

    Raises: UserError: when the folder of all scratch folders is not this user's own.
    """

    def __init__(self, parent: str | None) -> None:
        root = Path(parent or tempfile.gettempdir()) / f"cantor-scratch-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700, parents=True)
        _require_own(root)
        with lock(root, _LOCK_WAIT_S):  # one at a time: a new folder is not locked yet
            for old in root.iterdir():
                if old.is_dir() and not old.is_symlink() and not _is_in_use(old):
                    shutil.rmtree(old, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(dir=root))
            self._lock = open_lock(self.folder, os.O_CREAT)
            take_lock(self._lock)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _require_own(root: Path) -> None:
    """Refuse a folder that another user made, or may write to. Its parent is often shared.

    Raises: UserError: when it is not a folder that only this user can open.
    """
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode):
        fault = "is not a folder"
    elif status.st_uid != os.getuid():
        fault = "belongs to another user"
    elif status.st_mode & 0o077:
        fault = "is open to other users"
    else:
        return
    raise UserError(f"{root} {fault}; remove it, or set workers.scratch to a folder of your own")


def _is_in_use(folder: Path) -> bool:
    """Return True when a living process has this scratch folder."""
    try:
        with open_lock(folder) as file:
            return not take_lock(file)
    except (OSError, UserError):  # no lock of ours
        return False
