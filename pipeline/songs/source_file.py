"""The file of a song: its hash, whether it changed, whether its storage is mounted.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection

from pipeline.songs.plan import PlannedSong
from stages.errors import BadInput, Reason
from stages.open_file import open_source


def require_mounted(planned: PlannedSong, path: bytes, gone: Collection[str]) -> None:
    """Tell a song that is missing at `path` from a mount that went away during the run.

    gone: songs that were missing when the run began.

    Raises: FileNotFoundError: when the song's folder is gone or empty.
    """
    was_there = planned.mtime_ns > 0 and planned.song_id not in gone
    folder = os.path.dirname(path)
    if was_there and (not os.path.isdir(folder) or not any(os.scandir(folder))):
        detail = "the folder is gone or empty since this run began (is it still mounted?)"
        raise FileNotFoundError(errno.ENOENT, detail, os.fsdecode(folder))


def hash_source(path: bytes) -> tuple[os.stat_result, str]:
    """Return the status and the SHA-256 (hex) of a source file.

    Raises: BadInput: when the file is at fault; OSError: when the storage is.
    """
    with open(open_source(path), "rb") as file:
        return os.fstat(file.fileno()), hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(planned: PlannedSong, path: bytes) -> str:
    """Return the SHA-256 (hex) of a source file that is as it was planned.

    Raises: BadInput: when it changed; OSError: when the storage fails.
    """
    stat, sha256 = hash_source(path)
    if (stat.st_size, stat.st_mtime_ns) != (planned.size, planned.mtime_ns):
        raise BadInput(
            Reason.CHANGED,
            f"it has {stat.st_size} bytes, but {planned.size} when it was planned; pass "
            "--retry-quarantined to take it as it is now",
        )
    return sha256
