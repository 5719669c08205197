"""One process at a time in a folder.

Tested by tests/pipeline/cluster/test_resumable_run.py.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError

_LOCK_WAIT_S = 5.0


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder for the block, by FOLDER/.lock. The system releases the lock of a dead process.

    Raises: UserError: when another process keeps the lock for some seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is a file; name a folder") from error
    with (folder / ".lock").open("a+") as file:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    who = file.read().strip() or "another process"
                    raise UserError(
                        f"{folder} is in use by {who}; wait for it to end or stop it"
                    ) from error
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
