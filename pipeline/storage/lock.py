"""One process at a time in a folder.

Tested by tests/pipeline/cluster/test_resumable_run.py.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError

_LOCK_WAIT_S = 5.0
_OWNER = re.compile(rb"process \d+ on \S*")


@contextmanager
def lock(folder: Path, wait_s: float | None = None) -> Iterator[None]:
    """Lock a folder for the block, by FOLDER/.lock. The system releases the lock of a dead process.

    wait_s: how long to wait for another process; None: some seconds.

    Raises: UserError: when another process keeps the lock, or the file is not one of ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is a file; name a folder") from error
    with open_lock(folder, os.O_CREAT) as file:
        deadline = time.monotonic() + (_LOCK_WAIT_S if wait_s is None else wait_s)
        while not take_lock(file):
            if time.monotonic() > deadline:
                owner = _OWNER.match(file.read(200))
                who = owner[0].decode(errors="replace") if owner else "another process"
                raise UserError(f"{folder} is in use by {who}; wait for it to end or stop it")
            time.sleep(0.2)
        text = file.read(200)
        if text and not _OWNER.match(text):
            raise UserError(f"{folder}/.lock is of another program; name another folder")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        file.flush()
        yield


def open_lock(folder: Path, flags: int = 0) -> BinaryIO:
    """Open FOLDER/.lock. flags: O_CREAT to make it.

    Raises: UserError: when it is a link, a folder, or no plain file; FileNotFoundError: when it is
    not there.
    """
    path = folder / ".lock"
    odd = UserError(f"{path} is not a plain file of this program; remove it or name another folder")
    try:  # a FIFO is opened without waiting for its other end
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise odd from error
        raise
    file = os.fdopen(descriptor, "r+b", buffering=0)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise odd
    return file


def take_lock(file: BinaryIO) -> bool:
    """Lock an open file without waiting. Return False when another process has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
