"""Scratch folders for decoded audio.

Tested by tests/pipeline/extract/test_plan_changes.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class Scratch:
    """A scratch folder for decoded PCM. Making one removes those of dead processes."""

    def __init__(self, parent: str | None) -> None:
        root = Path(parent or tempfile.gettempdir()) / f"cantor-scratch-{os.getuid()}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (root / ".lock").open("ab") as door:  # one at a time: a new folder is not locked yet
            fcntl.flock(door, fcntl.LOCK_EX)
            for old in root.iterdir():
                if old.is_dir() and not _is_in_use(old):
                    shutil.rmtree(old, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(dir=root))
            self._lock = (self.folder / ".lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _is_in_use(folder: Path) -> bool:
    """Return True when a living process has this scratch folder."""
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
